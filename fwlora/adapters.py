"""Adapters as typed objects. The only file that knows how PEFT names its parameters and modules."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.adalora import AdaLoraLayer, SVDLinear
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.pytorch_utils import Conv1D

from fwlora.budget import MatrixShape

# One product for query, key and value, as ModernBERT, GPT-2, GPT-NeoX and Phi-3 have it.
FUSED_ATTENTION = ("attn.Wqkv", "attn.c_attn", "query_key_value", "qkv_proj")
# Names that papers and run files use for the projections of an encoder layer, and what the families call them. The
# first name that a model has counts; names joined by a space are the parts of one role (a gated feed-forward layer).
PROJECTION_ALIASES: dict[str, tuple[str, ...]] = {
    "query": ("query", "query_proj", "q_lin", "q_proj", "q", *FUSED_ATTENTION),
    "key": ("key", "key_proj", "k_lin", "k_proj", "k", *FUSED_ATTENTION),
    "value": ("value", "value_proj", "v_lin", "v_proj", "v", *FUSED_ATTENTION),
    "intermediate": (
        "intermediate.dense", "ffn.lin1", "ffn", "mlp.Wi", "DenseReluDense.wi", "wi", "wi_0 wi_1", "fc1", "mlp.c_fc",
        "mlp.gate_proj mlp.up_proj", "gate_up_proj", "dense_h_to_4h", "ff.layer_1",
    ),
    "output": (
        "output.dense", "ffn.lin2", "ffn_output", "mlp.Wo", "DenseReluDense.wo", "wo", "fc2", "mlp.c_proj",
        "mlp.down_proj", "dense_4h_to_h", "ff.layer_2",
    ),
}  # fmt: skip
ATTENTION_OUTPUT = "attention.output.dense"


class TargetModuleError(ValueError):
    """A target module name that matches no weight matrix of the encoder."""


class UncoveredError(ValueError):
    """A module uses something that a shortcut does not compute."""


@dataclass(frozen=True)
class AdapterPair:
    """One adapted matrix and its trainable factors.

    Attributes:
        name: path of the matrix in the model that was adapted, e.g. ``bert.encoder.layer.0.attention.self.query``.
        module: PEFT's layer around it; its output is that of base and adapter together.
        A: shape (r, d_in).
        B: shape (d_out, r).
        E: AdaLoRA's singular values, shape (r, 1); None for LoRA.
        scaling: s, so that the update is s B diag(E) A with E = 1 for LoRA.
        adapter_name: PEFT's name of the adapter.
    """

    name: str
    module: nn.Module
    A: nn.Parameter
    B: nn.Parameter
    E: nn.Parameter | None
    scaling: float
    adapter_name: str = "default"

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A', B) with the update equal to s B A': E is folded into A."""
        return (self.A if self.E is None else self.A * self.E), self.B


@dataclass(frozen=True)
class LinearParts:
    """What a linear layer, adapted or not, computes with: y = W x + b, plus the adapter of its pair.

    Attributes:
        weight: W, shape (d_out, d_in).
        bias: b, shape (d_out,), or None.
        adapted: whether the layer carries the active adapter.
        dropout: probability of dropout on the adapter's input.
    """

    weight: Tensor
    bias: Tensor | None
    adapted: bool
    dropout: float


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile`` and data-parallel wrappers."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def inner_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a PeftModel; a model without adapters is its own."""
    model = unwrap(model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def uses_prompt_learning(model: nn.Module) -> bool:
    """Whether PEFT puts learnt tokens before the input."""
    model = unwrap(model)
    return isinstance(model, PeftModel) and any(config.is_prompt_learning for config in model.peft_config.values())


def module_type(module: nn.Module) -> type[nn.Module]:
    """The module's type; where PEFT trains it in full and keeps it with the adapter, that of the wrapped module."""
    return type(module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module)


def adapter_config(model: nn.Module, adapter_name: str) -> Any:
    """PEFT's configuration of the adapter; None for a model that was adapted without a PeftModel around it."""
    for module in unwrap(model).modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict) and adapter_name in configs:
            return configs[adapter_name]
    return None


def find_active_adapter(model: nn.Module) -> str:
    """The name of the one active adapter.

    Raises:
        ValueError: there is no adapter, or several are active.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    active = list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))
    if not layers:
        raise ValueError(f"`model` ({type(model).__name__}) has no adapter; wrap it with peft.get_peft_model")
    if len(active) != 1:
        raise ValueError(f"`adapter_name` is not given and {len(active)} adapters are active {active}; name one")
    return active[0]


def find_adapter_pairs(model: nn.Module, adapter_name: str = "default") -> list[AdapterPair]:
    """Every matrix of ``model`` that carries the adapter, in model order.

    Raises:
        ValueError: the model has no such adapter, or one whose update is not s B A of two matrices (DoRA, a
            convolution, an embedding, fused attention).
    """
    model = unwrap(model)
    pairs: list[AdapterPair] = []
    unsuitable: list[str] = []
    present: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            present.update([*module.lora_A, *module.lora_embedding_A])
            if adapter_name in module.lora_embedding_A:
                unsuitable.append(path)
        if not isinstance(module, LoraLayer) or adapter_name not in module.lora_A:
            continue
        layer: Any = module  # PEFT's layers are untyped mixins
        A, B, E = layer.lora_A[adapter_name], layer.lora_B[adapter_name], None
        scaling = float(layer.scaling[adapter_name])
        if isinstance(module, AdaLoraLayer):
            E = layer.lora_E[adapter_name]
            scaling /= float(layer.ranknum[adapter_name]) + 1e-5
        else:
            A, B = A.weight, B.weight
        name = path.replace("_orig_mod.", "").rpartition("base_model.model.")[2]
        other_kind = A.dim() != 2 or isinstance(module, (MultiheadAttention, ParamWrapper))
        if other_kind or adapter_name in getattr(module, "lora_variant", {}):
            unsuitable.append(name)
        pairs.append(AdapterPair(name, layer, A, B, E, scaling, adapter_name))
    if unsuitable:
        raise ValueError(
            f"{len(unsuitable)} matrices of `model`, the first {unsuitable[0]!r}, carry a variant of LoRA (DoRA, a "
            "convolution, an embedding, fused attention) whose update is not s B A; use plain LoRA on linear layers"
        )
    if not pairs:
        others = f"; it has {', '.join(map(repr, sorted(present)))}" if present else ""
        raise ValueError(
            f"`model` ({type(model).__name__}) has no adapter named {adapter_name!r}{others}; "
            "wrap it with peft.get_peft_model"
        )
    return pairs


def read_linear(module: nn.Module) -> LinearParts:
    """The parts of ``nn.Linear``, or of PEFT's LoRA or AdaLoRA layer around one.

    Raises:
        UncoveredError: the layer computes anything else: the message says what.
    """
    if type(module) is nn.Linear:
        return LinearParts(module.weight, module.bias, False, 0.0)
    if type(module) not in (LoraLinear, SVDLinear):
        raise UncoveredError(f"a {type(module).__name__} layer")
    layer: Any = module
    base = layer.base_layer
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    features = {
        f"a {type(base).__name__} under the adapter": type(base) is not nn.Linear or layer.fan_in_fan_out,
        "a merged adapter": layer.merged,
        "a switched-off adapter": layer.disable_adapters,
        "several active adapters": len(active) > 1,
        "a variant of LoRA": any(name in layer.lora_variant for name in active),
        "a bias in the adapter": any(layer.lora_bias.get(name, False) for name in active),
        "adapters in another type than the base": any(
            parameter.dtype != base.weight.dtype
            for name in active
            for container in (layer.lora_A, layer.lora_B)
            for parameter in _parameters_of(container[name])
        ),
    }
    if found := [what for what, present in features.items() if present]:
        raise UncoveredError(", ".join(found))
    if not active:
        return LinearParts(base.weight, base.bias, False, 0.0)
    dropout = layer.lora_dropout[active[0]]
    if not isinstance(dropout, nn.Dropout | nn.Identity):
        raise UncoveredError(f"{type(dropout).__name__} in the adapter")
    return LinearParts(base.weight, base.bias, True, getattr(dropout, "p", 0.0))


def _parameters_of(factor: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    return [factor] if isinstance(factor, nn.Parameter) else list(factor.parameters())


@torch.no_grad()
def resize_adapter(pair: AdapterPair, A: Tensor, B: Tensor) -> None:
    """Gives a LoRA pair new factors, A (r', d_in) and B (d_out, r'), with the same scaling.

    Its parameters stay the same objects, so that an optimiser that holds them goes on; their gradients are forgotten.
    With r' = 0 the matrix loses its adapter: its layer computes the base alone from then on.
    """
    layer: Any = pair.module
    name, rank = pair.adapter_name, A.shape[0]
    if name not in layer.lora_A and rank > 0:
        raise RuntimeError(f"{pair.name!r} has lost its adapter and cannot be given rank {rank}")
    for parameter, value in ((pair.A, A), (pair.B, B)):
        dtype = parameter.dtype
        parameter.grad = None
        # A loss that is still held keeps the old shape's gradient accumulator alive; a new type makes torch drop it.
        parameter.data = parameter.data.to(torch.float32 if dtype == torch.float64 else torch.float64)
        parameter.data = value.to(device=parameter.device, dtype=dtype).contiguous()
    if name not in layer.lora_A:
        return
    if rank == 0:
        for container in (layer.lora_A, layer.lora_B, layer.lora_dropout, layer.scaling, layer.r, layer.lora_alpha):
            del container[name]
        return
    layer.lora_A[name].out_features = layer.lora_B[name].in_features = rank
    # The scaling stays: it is alpha / r for LoRA, alpha / sqrt(r) for rsLoRA.
    layer.lora_alpha[name] = pair.scaling * (math.sqrt(rank) if layer.use_rslora[name] else rank)
    layer.r[name] = rank


def record_ranks(model: nn.Module, pairs: Sequence[AdapterPair]) -> None:
    """Writes the pairs' ranks into the adapter's configuration, so that what is saved can be loaded."""
    config = adapter_config(model, pairs[0].adapter_name)
    if config is None:
        return
    kept: list[tuple[AdapterPair, Any]] = [(pair, pair.module) for pair in pairs if pair.rank > 0]
    config.rank_pattern = {pair.name: pair.rank for pair, _ in kept}
    config.alpha_pattern = {pair.name: layer.lora_alpha[pair.adapter_name] for pair, layer in kept}
    config.r = max(config.rank_pattern.values())
    config.lora_alpha = max(config.alpha_pattern.values())
    config.target_modules = {pair.name for pair, _ in kept}


def save_adapter(model: Any, folder: str | Path) -> None:
    """``model.save_pretrained`` for any method: a matrix that AdaLoRA pruned to rank 0 is no fault."""
    with warnings.catch_warnings():
        # PEFT takes empty factors for a sharded export that was not gathered.
        warnings.filterwarnings("ignore", message=r".*LoRA tensor\(s\) have invalid shape")
        model.save_pretrained(folder)


@torch.no_grad()
def delta_norms(pairs: Sequence[AdapterPair]) -> Tensor:
    """Frobenius norm of each pair's update s B A', shape (pairs,), from r x r products only."""
    norms = []
    for pair in pairs:
        A, B = (factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in pair.factors())
        squared = ((B.T @ B) * (A @ A.T)).sum()
        norms.append(pair.scaling * squared.clamp_min(0).sqrt())
    return torch.stack(norms)


def matrix_features(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a module that an adapter can be put on, else None."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return None


def stores_transposed(model: nn.Module, names: Sequence[str]) -> bool:
    """Whether these matrices are stored as (d_in, d_out): GPT-2's Conv1D. PEFT wants to be told."""
    return any(isinstance(model.get_submodule(name), Conv1D) for name in names)


def head_module_names(model: nn.Module, missing_keys: Sequence[str] = ()) -> list[str]:
    """Modules that start untrained and therefore train fully: all outside the encoder, and a pooler without weights.

    Args:
        model: a transformers model with a task head.
        missing_keys: parameter names that ``from_pretrained`` did not find in the checkpoint.

    Raises:
        ValueError: the checkpoint lacks parameters of the encoder itself.
    """
    encoder = getattr(model, "base_model_prefix", "")
    names = [
        name for name, child in model.named_children() if name != encoder and any(True for _ in child.parameters())
    ]
    unexplained = []
    for key in missing_keys:
        module = key.rpartition(".")[0]
        if any(f"{module}.".startswith(f"{name}.") for name in names):
            continue
        if any("pool" in part or "summary" in part for part in module.split(".")):
            names.append(module)
        else:
            unexplained.append(key)
    if unexplained:
        raise ValueError(f"{len(unexplained)} encoder parameters are not in it, the first {unexplained[0]!r}")
    return names


def encoder_parameter_count(model: Any) -> int:
    """Parameters of the encoder alone: embeddings and layers, no pooler and no head."""
    encoder = getattr(model, getattr(model, "base_model_prefix", ""), model)
    outside = {id(p) for name, child in encoder.named_children() if "pooler" in name for p in child.parameters()}
    if hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None:
        inputs = model.get_input_embeddings()
        tied = {id(p) for p in inputs.parameters()} if inputs is not None else set()
        outside |= {id(p) for p in model.get_output_embeddings().parameters()} - tied
    return sum(p.numel() for p in encoder.parameters() if id(p) not in outside)


def find_target_matrices(model: nn.Module, targets: Sequence[str]) -> list[MatrixShape]:
    """Encoder matrices that ``targets`` name, in model order.

    A target is the end of a module path (``query``, ``attention.output.dense``, or a full path), or one of the roles in
    :data:`PROJECTION_ALIASES`. The role ``output`` is the second feed-forward projection; the attention's own output
    projection has to be asked for as ``attention.output``. Modules of the head are never matched.

    Raises:
        TargetModuleError: a target without a match; the message lists what could be named.
    """
    available = dict(_encoder_matrices(model))
    chosen: set[str] = set()
    unmatched = []
    for target in targets:
        matches = _match_target(target, list(available))
        chosen.update(matches)
        if not matches:
            unmatched.append(target)
    if unmatched:
        kinds = dict.fromkeys(shape.kind for shape in available.values())
        raise TargetModuleError(
            f"no weight matrix of {type(model).__name__}'s encoder matches {', '.join(map(repr, unmatched))}; "
            f"it has {', '.join(kinds)}"
        )
    return [shape for name, shape in available.items() if name in chosen]


def present_roles(model: nn.Module) -> list[str]:
    """The roles of :data:`PROJECTION_ALIASES` that the model has matrices for.

    Raises:
        TargetModuleError: none of them; the targets have to be named then.
    """
    names = [name for name, _ in _encoder_matrices(model)]
    roles = [role for role in PROJECTION_ALIASES if _match_target(role, names)]
    if not roles:
        raise TargetModuleError(f"{type(model).__name__} has no projection of a known name; give `target_modules`")
    return roles


def _encoder_matrices(model: Any) -> Iterator[tuple[str, MatrixShape]]:
    encoder_name = getattr(model, "base_model_prefix", "")
    encoder = getattr(model, encoder_name, None)
    root, prefix = (model, "") if encoder is None else (encoder, f"{encoder_name}.")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for path, module in root.named_modules():
        features = matrix_features(module)
        if features and module is not head and not any("pooler" in part for part in path.split(".")):
            yield prefix + path, MatrixShape(prefix + path, *features)


def _match_target(target: str, names: Sequence[str]) -> list[str]:
    """Paths ending in the target, else those of the role it stands for."""

    def ending_in(suffix: str) -> list[str]:
        return [name for name in names if name == suffix or name.endswith(f".{suffix}")]

    direct = ending_in(target) or ending_in(f"{target}.dense")
    for alias in PROJECTION_ALIASES.get(target, ()):
        direct = direct or [name for part in alias.split() for name in ending_in(part)]
    if target.startswith("attention."):
        return direct
    return [name for name in direct if not name.endswith(f".{ATTENTION_OUTPUT}") or target == name]
