"""From token ids to logits: through the model as it is, or through the same computation in fewer passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation

from fwlora.adapters import AdapterPair
from fwlora.estimators import PassEstimator
from fwlora.experiment.fused.compiled import Kernels
from fwlora.experiment.fused.compiled_layer import CompiledLayer
from fwlora.experiment.fused.encoder import EncoderCall, EncoderFunction, EncoderLayer, ObserveLayer, run_forward
from fwlora.experiment.fused.families import Family, find_family
from fwlora.experiment.fused.layer import FusedLayer, LayerWeights, Norm
from fwlora.experiment.fused.read_model import (
    LinearParts,
    UnsupportedModelError,
    inner_model,
    module_type,
    read_linear,
    uses_prompt_learning,
)

FindEstimator = Callable[[], PassEstimator | None]


class PlainClassifier(nn.Module):
    """The model's own forward pass.

    Args:
        model: returns an object with ``logits``.
        precision: ``bf16`` autocasts.
    """

    def __init__(self, model: nn.Module, precision: str = "fp32") -> None:
        super().__init__()
        self.model, self.precision = model, precision

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Tensor) -> Tensor:
        """Return logits in float32 or better, shape (batch, classes).

        Args:
            input_ids: shape (batch, width).
            attention_mask: shape (batch, width), 0 at padding; None where no example is padded.
            **inputs: further tensors that the model takes.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return _at_least_float32(self.model(input_ids=input_ids, attention_mask=attention_mask, **inputs).logits)


class FastClassifier(nn.Module):
    """The same logits and gradients, for encoders like BERT with a frozen base; ``fused_layer`` says how.

    Base weights, scalings and the active adapter are read once, here, and must not change afterwards: no merging,
    switching, disabling or change of type. Adapters and head are the model's own parameters. While this classifier is
    in training mode, dropout is drawn from torch's distribution by another algorithm.

    Args:
        model: a model of a family in :mod:`fwlora.experiment.fused.families`, adapted or not.
        pairs: its adapters.
        precision: ``bf16`` multiplies in bfloat16, and normalizes and keeps residuals in float32, as autocast does.
        find_estimator: returns the estimator of gradient norms of a training pass, or None; hooks are bypassed.
        kernels: of the precision's type, for all but the products; None leaves the layers to torch's operations.

    Attributes:
        remark: why the kernels are not used; None where they are, or there are none.

    Raises:
        UnsupportedModelError: the model uses what this path does not compute; the message says what.
    """

    def __init__(
        self,
        model: nn.Module,
        pairs: Sequence[AdapterPair],
        precision: str = "fp32",
        find_estimator: FindEstimator = lambda: None,
        *,
        kernels: Kernels | None = None,
    ) -> None:
        super().__init__()
        self.model, self.precision, self._find_estimator = model, precision, find_estimator
        inner: Any = inner_model(model)
        if uses_prompt_learning(model):
            raise UnsupportedModelError("learnt prompts")
        self.family = _check_architecture(inner, pairs)
        # Outside of the module tree, where they would be a second path to the same parameters.
        self._inner, self._encoder = [inner], [getattr(inner, inner.base_model_prefix)]
        places = {id(pair.module): place for place, pair in enumerate(pairs)}
        layers = self.family.layers(self._encoder[0])
        # By layer, group and member.
        self.pairs: list[list[list[AdapterPair]]] = []
        self._places: list[dict[str, int]] = []
        read: list[LayerWeights] = []
        for module in layers:
            found = {name: module.get_submodule(path) for name, path in self.family.linear_paths.items()}
            own = {name: places[id(linear)] for name, linear in found.items() if id(linear) in places}
            # A matrix that lost its adapter to a reallocation is a base layer.
            own = {name: place for name, place in own.items() if pairs[place].rank > 0}
            scalings = {name: pairs[place].scaling for name, place in own.items()}
            read.append(_read_layer(self.family, module, found, scalings))
            self._places.append(own)
        self.layers, self.remark = _make_layers(read, precision, kernels)
        for layer, own in zip(self.layers, self._places, strict=True):
            self.pairs.append([[pairs[own[name]] for name in group.adapted] for group in layer.groups.values()])
        _check_training(self.family, inner, pairs)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Return logits in float32 or better, shape (batch, classes).

        Args:
            input_ids: shape (batch, width).
            attention_mask: shape (batch, width), 0 at padding; None where no example is padded.
            token_type_ids: shape (batch, width); None where all are 0.
        """
        batch = len(input_ids)
        factors = [[[pair.factors() for pair in group] for group in layer] for layer in self.pairs]
        with torch.no_grad():
            hidden = self.family.embed(self._encoder[0], input_ids, token_type_ids).flatten(0, 1)
            adapters = [
                {name: group.gather(own) for (name, group), own in zip(layer.groups.items(), by_group, strict=True)}
                for layer, by_group in zip(self.layers, factors, strict=True)
            ]
        hidden, layout = self.layers[0].lay_out(hidden, attention_mask, batch)
        seed = int(torch.randint(2**62, ())) if self.training else None
        dropout = self._encoder[0].get_submodule(self.family.embeddings_dropout_path).p
        call = EncoderCall(self.layers, adapters, batch, layout, seed, dropout, self._make_observe())
        flat = [factor for layer in factors for group in layer for pair in group for factor in pair]
        if flat and torch.is_grad_enabled():
            first = EncoderFunction.apply(hidden, call, *flat)
        else:
            first = run_forward(call, hidden, keep=False)[0]
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return _at_least_float32(self.family.head(self._inner[0], self._encoder[0], first[:, None]))

    def _make_observe(self) -> ObserveLayer | None:
        estimator = self._find_estimator() if self.training else None
        if estimator is None:
            return None

        def observe(layer: int, names: Sequence[str], X: Tensor, G: Tensor) -> None:
            for name, gradient in zip(names, G, strict=True):
                estimator.observe(self._places[layer][name], X, gradient)

        return observe


def _make_layers(
    weights: Sequence[LayerWeights], precision: str, kernels: Kernels | None
) -> tuple[Sequence[EncoderLayer], str | None]:
    """Make the layers, and say why they do not use the kernels, where there are any."""
    dtype = torch.bfloat16 if precision == "bf16" else weights[0].linear["query"].weight.dtype
    last = len(weights) - 1
    reasons = [reason for layer in weights if kernels and (reason := CompiledLayer.unsuitable(layer))]
    if kernels is not None and not reasons and kernels.dtype != dtype:
        reasons = [f"they multiply in {kernels.dtype}"]
    if kernels is not None and not reasons:
        return [CompiledLayer(w, kernels, first_only=n == last) for n, w in enumerate(weights)], None
    remark = f"layers are computed by torch's operations, not by compiled kernels: {reasons[0]}" if reasons else None
    return [FusedLayer(w, dtype, first_only=n == last) for n, w in enumerate(weights)], remark


def make_classifier(
    model: nn.Module,
    pairs: Sequence[AdapterPair],
    precision: str,
    find_estimator: FindEstimator,
    *,
    fast: bool,
    kernels: Kernels | None = None,
) -> tuple[nn.Module, str | None]:
    """Return the fast path where it covers the model, else the plain one, and why a faster one is not taken."""
    if not fast:
        return PlainClassifier(model, precision), None
    try:
        classifier = FastClassifier(model, pairs, precision, find_estimator, kernels=kernels)
        return classifier, classifier.remark
    except UnsupportedModelError as error:
        return PlainClassifier(model, precision), f"the fused path does not cover {error}: the model computes by itself"


def _check_architecture(model: Any, pairs: Sequence[AdapterPair]) -> Family:
    family = find_family(model)
    if family is None:
        raise UnsupportedModelError(type(model).__name__)
    config, encoder = model.config, getattr(model, model.base_model_prefix)
    layers = family.layers(encoder)
    adapted = {id(pair.module) for pair in pairs}  # on these, the hooks are those of the estimator
    bypassed = [
        encoder.get_submodule(family.stack_path),
        *(m for layer in layers for m in layer.modules() if id(m) not in adapted),
    ]
    try:
        has_own_head = module_type(model.get_submodule(family.head_path)) is not family.head_class
    except AttributeError:
        has_own_head = True
    _raise_for({
        "a decoder": getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False),
        "a projection of the embeddings": hasattr(encoder, "embeddings_project"),
        "a head of its own": has_own_head,
        "layers of its own": any(type(layer) is not family.layer_class for layer in layers),
    })  # fmt: skip
    norms = [layer.get_submodule(path) for layer in layers for path in family.norm_paths]
    activations = [layer.get_submodule(family.activation_path) for layer in layers]
    _raise_for({
        f"the activation {config.hidden_act!r}": any(type(a) is not GELUActivation for a in activations),
        "another normalization": any(type(norm) is not nn.LayerNorm for norm in norms),
        "gradient checkpointing": any(getattr(module, "gradient_checkpointing", False) for module in encoder.modules()),
        "hooks on modules that it passes by": any(_has_hooks(module) for module in bypassed),
    })  # fmt: skip
    return family


def _has_hooks(module: nn.Module) -> bool:
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(kinds)


def _check_training(family: Family, model: Any, pairs: Sequence[AdapterPair]) -> None:
    encoder = getattr(model, model.base_model_prefix)
    trained = {id(factor) for pair in pairs for factor in (pair.A, pair.B, pair.E)}
    parts = [encoder.get_submodule(path) for path in (family.embeddings_path, family.stack_path)]
    body = [parameter for part in parts for parameter in part.parameters()]
    _raise_for({
        "base weights that are trained": any(p.requires_grad and id(p) not in trained for p in body),
        "adapters that are not trained": any(not p.requires_grad for pair in pairs for p in (pair.A, pair.B)),
    })  # fmt: skip


def _raise_for(features: dict[str, bool]) -> None:
    if found := [what for what, present in features.items() if present]:
        raise UnsupportedModelError(", ".join(found))


def _read_layer(family: Family, module: Any, linear: dict[str, nn.Module], scalings: dict[str, float]) -> LayerWeights:
    parts: dict[str, LinearParts] = {name: read_linear(part) for name, part in linear.items()}
    if {name for name, part in parts.items() if part.adapted} != set(scalings):
        raise UnsupportedModelError("an adapter that the method does not know")
    if len({part.dropout for part in parts.values() if part.adapted}) > 1:
        raise UnsupportedModelError("unlike dropout probabilities of adapters")
    norms = []
    for path in family.norm_paths:
        norm: Any = module.get_submodule(path)
        norms.append(Norm(norm.weight.detach(), norm.bias.detach(), norm.eps))
    attention = module.get_submodule(family.attention_path)
    hidden_dropouts = [module.get_submodule(path).p for path in family.dropout_paths]
    probabilities = [part.dropout for part in parts.values()] + [attention.dropout.p, *hidden_dropouts]
    if any(probability >= 1 for probability in probabilities):
        raise UnsupportedModelError("a dropout probability of 1")
    return LayerWeights(parts, scalings, norms, attention.num_attention_heads, hidden_dropouts, attention.dropout.p)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
