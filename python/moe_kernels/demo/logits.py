"""``demo logits``: one model on two prompts, and a large model with what tuning did to a small one."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from moe_kernels.demo import tuned_pair
from moe_kernels.demo.model import LanguageModel
from moe_kernels.demo.settings import LogitSettings
from moe_kernels.demo.text import Texts

#: a context that contradicts what a model has learned, a question, and what the context says
CONTEXTS = (
    ("Because of the dust the sky was green.", "What colour is the sky?", "The sky is", "green"),
    ("In this story, the capital of France is Lyon.", "What is the capital of France?", "It is", "Lyon"),
    ("On planet Zog, water boils at 50 degrees.", "At how many degrees does water boil?", "Water boils at", "50"),
    ("Due to an experiment, the cats on this island bark.", "What does a cat do?", "A cat", "bark"),
    ("After the reform a week has nine days.", "How many days has a week?", "A week has", "nine"),
    ("The museum says that Vermeer painted the Mona Lisa.", "Who painted the Mona Lisa?", "It was", "Vermeer"),
)
#: what the model is asked to be, what guidance leads away from, and the question
ROLES = (
    ("You are a pirate. Talk like a pirate.", "You are a helpful assistant.", "Where do you live?"),
    ("You are very sad.", "You are very happy.", "How was your day?"),
    ("Answer in one short sentence.", "Answer at great length.", "What is a volcano?"),
)


class Watched:
    """A fusion that keeps how long it took, and, aside from that time, what it did at each step.

    Attributes:
        seconds: in the fusion.
        aside: in the observation, which is not part of the generation.
        moved: at each step KL(fused || generating model) of the first row, in nats.
        weights: at each step what ``weigh`` gives for the logits, if it is given.
    """

    def __init__(self, fuse: Callable[..., Tensor], weigh: Callable[..., Tensor] | None = None):
        self.fuse, self.weigh = fuse, weigh
        self.seconds = self.aside = 0.0
        self.moved: list[float] = []
        self.weights: list[float] = []

    def __call__(self, *logits: Tensor, **options) -> Tensor:
        begin = time.perf_counter()
        fused = self.fuse(*logits, **options)
        middle = time.perf_counter()
        log_probs = self.fuse(*(source[:1] for source in logits), out="log_probs")[0].double()
        base = logits[0][0].double().log_softmax(0)[: log_probs.shape[0]]
        kept = log_probs > -torch.inf
        self.moved.append((log_probs.exp() * (log_probs - base))[kept].sum().item())
        if self.weigh is not None:
            self.weights.append(self.weigh(*(source[:1] for source in logits))[0].item())
        self.seconds += middle - begin
        self.aside += time.perf_counter() - middle
        return fused


def generate(language_model: LanguageModel, prompt: Tensor, num_tokens: int, fusion=None, weigh=None, **more) -> dict:
    """Greedy tokens after ``prompt`` [length]: the text, how many, and where the time went."""
    watched = Watched(fusion.fuse, weigh) if fusion is not None else None
    if watched is not None:
        fusion.fuse, more = watched, {"custom_generate": fusion, **more}
    begin = time.perf_counter()
    arguments = {"max_new_tokens": num_tokens, "do_sample": False, "pad_token_id": 0, **more}
    ids = language_model.model.generate(
        input_ids=prompt[None], attention_mask=torch.ones_like(prompt)[None], **arguments
    )
    seconds = time.perf_counter() - begin
    new = ids[0, prompt.numel() :]
    result = {"text": language_model.tokenizer.decode(new.tolist()), "tokens": new.numel(), "seconds": seconds}
    if watched is not None:
        result |= {"seconds": seconds - watched.aside, "fusion_seconds": watched.seconds}
        result |= {"moved": watched.moved, "weights": watched.weights}
    return result


def run(
    language_model: LanguageModel, kinds: Mapping[str, Texts], settings: LogitSettings, seed: int, progress
) -> dict:
    """Context-aware decoding, guidance, and emulated fine-tuning with a pair that is trained here.

    Args:
        kinds: name -> text; the pair's untuned half reads all but the last, its tuned half the last one besides.

    Returns:
        ``context``: for each question the answers without the context, with it, and context-aware; ``guidance``: for
        each role the texts without and with; ``beams``: for each role whether transformers' own guidance finds the same
        beams; ``tuning``: see :func:`tuned_pair.run`.
    """
    result: dict = {"model": language_model.name, "settings": asdict(settings)}
    language_model.model.generation_config.max_length = None  # each call says how many new tokens
    result["context"] = [
        _answer(language_model, *case, settings) for case in progress(CONTEXTS[: settings.num_prompts], "contexts")
    ]
    roles = ROLES[: settings.num_prompts]
    result["guidance"] = [_guided(language_model, *role, settings) for role in progress(roles, "guidance")]
    result["beams"] = [_beams(language_model, *role, settings) for role in progress(roles, "beams")]
    result["tuning"] = tuned_pair.run(language_model, kinds, settings, seed, generate, progress)
    return result


def _answer(
    language_model: LanguageModel, context: str, question: str, begin: str, said: str, settings: LogitSettings
) -> dict:
    from moe_kernels.integrations.transformers import fusions

    asked = f"Question: {question}\nAnswer: {begin}"
    without, with_context = language_model.encode(asked), language_model.encode(f"{context}\n{asked}")
    aware = fusions.context_aware(without[None], strength=settings.strength)
    num_tokens = settings.answer_tokens
    return {
        "context": context,
        "said": said,
        "question": f"{question} {begin}",
        "without": generate(language_model, without, num_tokens),
        "with": generate(language_model, with_context, num_tokens),
        "aware": generate(language_model, with_context, num_tokens, aware),
    }


def _guided(language_model: LanguageModel, role: str, other: str, question: str, settings: LogitSettings) -> dict:
    from moe_kernels.integrations.transformers import fusions

    prompt, negative = (chat(language_model, system, question) for system in (role, other))
    fusion = fusions.guidance(settings.scale, negative[None])
    return {
        "role": role,
        "away_from": other,
        "question": question,
        "plain": generate(language_model, prompt, settings.new_tokens),
        "guided": generate(language_model, prompt, settings.new_tokens, fusion),
    }


def _beams(language_model: LanguageModel, role: str, other: str, question: str, settings: LogitSettings) -> dict:
    """The same guidance under beam search by transformers, whose negative prompt ignores the beams, and by us."""
    from moe_kernels.integrations.transformers import fusions

    prompt, negative = (chat(language_model, system, question) for system in (role, other))
    arguments = {"num_beams": settings.num_beams, "num_tokens": settings.beam_tokens}
    # transformers takes one row of negative prompt for each beam
    rows = negative[None].repeat(settings.num_beams, 1)
    theirs = generate(language_model, prompt, guidance_scale=settings.scale, negative_prompt_ids=rows, **arguments)
    fusion = fusions.guidance(settings.scale, negative[None])
    ours = generate(language_model, prompt, fusion=fusion, **arguments)
    return {"role": role, "question": question, "transformers": theirs["text"], "ours": ours["text"]}


def chat(language_model: LanguageModel, system: str, user: str) -> Tensor:
    """Token ids [num_tokens] up to where the model answers."""
    tokenizer = language_model.tokenizer
    if getattr(tokenizer, "chat_template", None) is None:
        return language_model.encode(f"{system}\nQuestion: {user}\nAnswer:")
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return language_model.encode(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
