"""Transformers' architectures: names of projections, the encoder's matrices and parameters, and the head."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import MODEL_MAPPING
from transformers.pytorch_utils import Conv1D

from fwlora.budget import MatrixShape

# One product for query, key and value, as in ModernBERT, GPT-2, GPT-NeoX and Phi-3.
FUSED_ATTENTION = ("attn.Wqkv", "attn.c_attn", "query_key_value", "qkv_proj")
# Names that papers and run files use for the projections of an encoder layer, and what the families call them. The
# first name that a model has counts; names joined by a space are the parts of one role (a gated feed-forward layer).
PROJECTION_ALIASES: dict[str, tuple[str, ...]] = {
    "query": ("query", "query_proj", "q_lin", "q_proj", "q", "q_head", *FUSED_ATTENTION),
    "key": ("key", "key_proj", "k_lin", "k_proj", "k", "k_head", *FUSED_ATTENTION),
    "value": ("value", "value_proj", "v_lin", "v_proj", "v", "v_head", *FUSED_ATTENTION),
    "intermediate": (
        "intermediate.dense", "ffn.lin1", "ffn", "mlp.Wi", "DenseReluDense.wi", "wi", "wi_0 wi_1", "fc1", "mlp.c_fc",
        "mlp.gate_proj mlp.up_proj shared_expert.gate_proj shared_expert.up_proj shared_experts.gate_proj "
        "shared_experts.up_proj", "gate_up_proj", "dense_h_to_4h", "ff.layer_1", "mlp.fc_in", "ffn.up_proj",
        "feed_forward.intermediate_dense", "pwconv1", "ffn.linear_1",
    ),
    "output": (
        "output.dense", "ffn.lin2", "ffn_output", "mlp.Wo", "DenseReluDense.wo", "wo", "fc2", "mlp.c_proj",
        "mlp.down_proj shared_expert.down_proj shared_experts.down_proj", "dense_4h_to_h", "ff.layer_2", "mlp.fc_out",
        "ffn.down_proj", "feed_forward.output_dense", "pwconv2", "ffn.linear_2",
    ),
}  # fmt: skip
ATTENTION_OUTPUT = "attention.output.dense"


class TargetModuleError(ValueError):
    """A name of target modules that matches no weight matrix of the encoder."""


def matrix_features(module: nn.Module) -> tuple[int, int] | None:
    """Return (d_in, d_out) of a module that can get an adapter, else None."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return None


def stores_transposed(model: nn.Module, names: Sequence[str]) -> bool:
    """Return whether these matrices are stored as (d_in, d_out), as GPT-2's Conv1D is: PEFT's ``fan_in_fan_out``."""
    return any(isinstance(model.get_submodule(name), Conv1D) for name in names)


def head_module_names(model: nn.Module, missing_keys: Sequence[str] = ()) -> list[str]:
    """Find the modules that start untrained and train in full: all outside the encoder, and a pooler without weights.

    Args:
        model: a transformers model with a task head.
        missing_keys: parameter names that ``from_pretrained`` did not find in the checkpoint.

    Raises:
        ValueError: the checkpoint lacks parameters of the encoder itself.
    """
    encoder = _encoder_children(model)
    names = [
        name for name, child in model.named_children() if name not in encoder and any(True for _ in child.parameters())
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
    """Count the parameters of the encoder alone: embeddings and layers, no pooler and no head.

    Weights that are stored packed, as those of a 4-bit model, count as the matrices that they stand for.
    """
    parts = [model.get_submodule(name) for name in _encoder_children(model)] or [model]
    poolers = [child for part in parts for name, child in part.named_children() if "pooler" in name]
    counted = {id(p) for pooler in poolers for p in pooler.parameters()}
    if hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None:
        inputs = model.get_input_embeddings()
        tied = {id(p) for p in inputs.parameters()} if inputs is not None else set()
        counted |= {id(p) for p in model.get_output_embeddings().parameters()} - tied
    outside = {id(module) for pooler in poolers for module in pooler.modules()}
    total = 0
    for module in (module for part in parts for module in part.modules()):
        own = {name: p for name, p in module.named_parameters(recurse=False) if id(p) not in counted}
        counted.update(map(id, own.values()))
        total += sum(map(_count_values, own.values()))
        if id(module) not in outside and _is_packed(module):
            packed = own.get("weight")
            total += module.in_features * module.out_features - (0 if packed is None else _count_values(packed))
    return total


def find_target_matrices(model: nn.Module, targets: Sequence[str]) -> list[MatrixShape]:
    """Find the encoder's matrices that ``targets`` name, in model order.

    A target is the end of a module path (``query``, ``attention.output.dense``, or a full path), or one of the roles in
    :data:`PROJECTION_ALIASES`. The role ``output`` is the second feed-forward projection; the attention's own output
    projection is named ``attention.output``. Modules of the head are never matched.

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
    """List the roles of :data:`PROJECTION_ALIASES` that the model has matrices for.

    Raises:
        TargetModuleError: none of them; the targets have to be named then.
    """
    names = [name for name, _ in _encoder_matrices(model)]
    roles = [role for role in PROJECTION_ALIASES if _match_target(role, names)]
    if not roles:
        raise TargetModuleError(f"{type(model).__name__} has no projection of a known name; give `target_modules`")
    return roles


def list_left_out(model: nn.Module, roles: Sequence[str]) -> list[str]:
    """List what the roles of :data:`PROJECTION_ALIASES` leave out of a model's attention and feed-forward layers.

    Args:
        model: to be adapted.
        roles: those that it has, of :func:`present_roles`.

    Returns:
        The roles without a matrix, and the kinds of weights that are no linear layer's: experts that are one tensor,
        and attention that multiplies by tensors of its own.
    """
    missing = [f"no matrix of the role {role!r}" for role in PROJECTION_ALIASES if role not in roles]
    tensors: dict[str, None] = {}
    for path, module in _encoder_modules(model):
        if isinstance(module, (_ConvNd, nn.Embedding)) or "parametrizations" in path:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and parameter.shape[0] > 1 and not re.search("bias|emb|token|position", name):
                tensors[MatrixShape(f"{path}.{name}", 1, 1).kind] = None
    return missing + [f"{kind} is not a linear layer's" for kind in tensors]


def _encoder_children(model: Any) -> list[str]:
    """List the children of a transformers model that make up the encoder; none where that is the whole model.

    The encoder is ``base_model_prefix``, or else what the model without its task head has as well.
    """
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and isinstance(getattr(model, prefix, None), nn.Module):
        return [prefix]
    children = [name for name, _ in model.named_children()]
    try:
        base_class: Any = MODEL_MAPPING[type(model.config)]
        with torch.device("meta"):
            base = (base_class[0] if isinstance(base_class, tuple) else base_class)(model.config)
    except Exception:  # what a configuration lacks, its model class decides
        return []
    shared = {name for name, _ in base.named_children()}
    return [] if shared >= set(children) else [name for name in children if name in shared]


def _encoder_modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield path and module of everything in the encoder but poolers and the output embeddings."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name in _encoder_children(model) or [""]:
        for path, module in model.get_submodule(name).named_modules(prefix=name):
            inner = path.removeprefix(name)
            if module is not head and not any("pooler" in part for part in inner.split(".")):
                yield path, module


def _encoder_matrices(model: Any) -> Iterator[tuple[str, MatrixShape]]:
    for path, module in _encoder_modules(model):
        features = matrix_features(module)
        if features:
            yield path, MatrixShape(path, *features)


def _count_values(parameter: Any) -> int:
    """Count the values that a parameter stands for: those of a packed or a partitioned one, too."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    if shape is not None:
        return math.prod(shape)
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _is_packed(module: Any) -> bool:
    """Return whether a linear layer stores its weight in another form than in_features x out_features values."""
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not all(isinstance(size, int) for size in sizes):
        return False
    weight = getattr(module, "weight", None)
    return not isinstance(weight, nn.Parameter) or _count_values(weight) != module.in_features * module.out_features


def _match_target(target: str, names: Sequence[str]) -> list[str]:
    """Return the paths that end in the target, else those of the role of that name."""

    def ending_in(suffix: str) -> list[str]:
        return [name for name in names if name == suffix or name.endswith(f".{suffix}")]

    direct = ending_in(target) or ending_in(f"{target}.dense")
    for alias in PROJECTION_ALIASES.get(target, ()):
        direct = direct or [name for part in alias.split() for name in ending_in(part)]
    if target.startswith("attention."):
        return direct
    return [name for name in direct if not name.endswith(f".{ATTENTION_OUTPUT}") or target == name]
