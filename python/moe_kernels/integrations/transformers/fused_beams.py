"""Beam search over fused logits: transformers' own search, which sees one model where there are several."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.modeling_outputs import CausalLMOutput

from moe_kernels.integrations.transformers.joint_sources import JointSources
from moe_kernels.integrations.transformers.source_state import check_rows


def search_beams(
    model: PreTrainedModel,
    sources: JointSources,
    fuse: Callable[..., Tensor],
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
):
    """What ``generate`` returns for beams; ``input_ids`` [batch_size * num_beams, length]."""
    fused = _FusedModel(model, sources, fuse, generation_config.num_beams)
    return fused._beam_search(
        input_ids,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        generation_config=generation_config,
        use_cache=True,
    )


class _FusedModel(GenerationMixin):
    """Takes whole sequences and finds by them which cache each beam goes on with.

    A search that reorders its beams need not tell: within one prompt, equal tokens mean equal caches.
    """

    def __init__(self, model: PreTrainedModel, sources: JointSources, fuse: Callable[..., Tensor], num_beams: int):
        self.config, self.generation_config = model.config, model.generation_config
        self.sources, self.fuse, self.num_beams = sources, fuse, num_beams
        self.read: Tensor | None = None

    def prepare_inputs_for_generation(self, input_ids: Tensor, **_) -> dict:
        return {"input_ids": input_ids}

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs: dict, **_) -> dict:
        return model_kwargs

    def __call__(self, input_ids: Tensor, return_dict: bool = True) -> CausalLMOutput:
        if self.read is not None:
            self.sources.select(self.parents(input_ids[:, :-1]))
            self.sources.append(input_ids[:, -1:])
        self.read = input_ids.clone()
        log_probs = self.fuse(*self.sources.logits(), out="log_probs")
        check_rows((log_probs > -torch.inf).any(1), torch.arange(input_ids.shape[0], device=input_ids.device))
        return CausalLMOutput(logits=log_probs[:, None])

    def parents(self, before: Tensor) -> Tensor:
        """[num_rows]: the row whose cache has read what a row [num_rows, length] begins with."""
        now, then = (ids.unflatten(0, (-1, self.num_beams)) for ids in (before, self.read))
        same = (now[:, :, None] == then[:, None]).all(-1)
        if not same.any(-1).all():
            raise RuntimeError("FusedGeneration: beams must grow by one token a step, got one whose past is unknown")
        first = torch.arange(0, before.shape[0], self.num_beams, device=before.device)
        return (same.long().argmax(-1) + first[:, None]).flatten()
