"""X-LoRA: a small network reads the model's own last hidden states and weighs the adapters of every token."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_kernels._checks import shape_error, value_error
from moe_kernels.nn.multi_lora import AdapterRouting, MultiLoRALinear


class XLoRAClassifier(nn.Module):
    """Hidden states -> weights of the adapters: ``softmax(MLP(h_t) / temperature)``, a set a layer or one for all.

    Args:
        depth: linear layers, with ReLU between them; 1 is one linear map.
        inner_size: width between them.
        layerwise: weights of each adapted layer instead of one set for all.
        softmax: False leaves the logits as they are.
    """

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        num_adapters: int,
        *,
        depth: int = 1,
        inner_size: int = 2048,
        layerwise: bool = False,
        softmax: bool = True,
        temperature: float = 1.0,
    ):
        super().__init__()
        if temperature <= 0:
            raise value_error("XLoRAClassifier", "temperature", "above 0", temperature)
        self.num_layers, self.num_adapters, self.layerwise = num_layers, num_adapters, layerwise
        self.softmax, self.temperature = softmax, temperature
        sizes = [hidden_size, *[inner_size] * (depth - 1), num_adapters * (num_layers if layerwise else 1)]
        layers: list[nn.Module] = []
        for number in range(depth):
            layers += [nn.ReLU()] if number else []
            layers.append(nn.Linear(sizes[number], sizes[number + 1]))
        self.layers = nn.Sequential(*layers)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., hidden_size] -> [..., num_layers, num_adapters]."""
        logits = self.layers(hidden_states).unflatten(-1, (-1, self.num_adapters))
        weights = (logits / self.temperature).softmax(-1) if self.softmax else logits
        return weights.expand(*weights.shape[:-2], self.num_layers, self.num_adapters)


class XLoRA(nn.Module):
    """X-LoRA (arXiv 2402.07148): a pass to choose, then one with ``W x + g sum_e lambda_e s_e B_e A_e x``.

    The first pass runs the model with every adapter at ``scaling_pass_value`` (0: without adapters) and without
    gradients; ``lambda`` comes from its last hidden states through the classifier. With ``top_k``, the others weigh
    nothing and are not computed; the chosen ones keep their weights, or share 1 where ``softmax_topk``.

    Args:
        model: called as it is; its first pass with ``output_hidden_states=True`` must give ``hidden_states``.
        layers: the adapted layers in ``model``, in the classifier's order; each gets its own
            :class:`AdapterRouting`. Adapters are slots 0 to ``num_adapters - 1`` of their pools.
        classifier: hidden states -> [batch, length, num_layers, num_adapters].
        global_scaling_weight: g.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[MultiLoRALinear],
        classifier: XLoRAClassifier,
        *,
        top_k: int | None = None,
        softmax_topk: bool = False,
        global_scaling_weight: float = 1.0,
        scaling_pass_value: float = 0.0,
    ):
        super().__init__()
        if len(layers) != classifier.num_layers:
            raise value_error("XLoRA", "layers", f"num_layers={classifier.num_layers} layers", len(layers))
        if top_k is not None and not 1 <= top_k <= classifier.num_adapters:
            raise value_error("XLoRA", "top_k", f"in [1, num_adapters={classifier.num_adapters}]", top_k)
        self.model, self.classifier = model, classifier
        self.top_k, self.softmax_topk = top_k, softmax_topk
        self.global_scaling_weight, self.scaling_pass_value = global_scaling_weight, scaling_pass_value
        self.routings = [AdapterRouting() for _ in layers]
        for layer, routing in zip(layers, self.routings, strict=True):
            layer.routing = routing

    def forward(self, *arguments, **options):
        with torch.no_grad():
            hidden_states = self._first_pass(*arguments, **options)
        self.set_weights(self.classifier(hidden_states))
        return self.model(*arguments, **options)

    def _first_pass(self, *arguments, **options) -> Tensor:
        for routing in self.routings:
            routing.set(None)
        if self.scaling_pass_value:
            first = arguments[0] if arguments else next(iter(options.values()))
            ids = torch.arange(self.classifier.num_adapters, dtype=torch.int32, device=first.device)
            ids = ids.expand(len(first), -1)
            for routing in self.routings:
                routing.set(ids, torch.full(ids.shape, self.scaling_pass_value, device=ids.device))
        return self.model(*arguments, **options, output_hidden_states=True).hidden_states[-1]

    def set_weights(self, weights: Tensor) -> None:
        """Gives every layer its weights, [batch, length, num_layers, num_adapters]."""
        expected = (self.classifier.num_layers, self.classifier.num_adapters)
        if weights.shape[-2:] != expected:
            shape = f"[..., num_layers={expected[0]}, num_adapters={expected[1]}]"
            raise shape_error("XLoRA", "weights", shape, weights)
        for routing, of_layer in zip(self.routings, weights.flatten(0, -3).unbind(1), strict=True):
            ids = torch.arange(expected[1], dtype=torch.int32, device=weights.device).expand(of_layer.shape)
            if self.top_k is not None:
                of_layer, chosen = of_layer.topk(self.top_k, dim=1)
                ids = chosen.int()
                if self.softmax_topk:
                    of_layer = of_layer.softmax(1)
            routing.set(ids, of_layer * self.global_scaling_weight, per="token")
