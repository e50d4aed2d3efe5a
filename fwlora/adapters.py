"""Adapters as typed objects. The only file that knows how PEFT names its parameters and modules."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fwlora.budget import MatrixShape

# Names that papers and run files use for the projections of an encoder layer, and what the families call them.
PROJECTION_ALIASES: dict[str, tuple[str, ...]] = {
    "query": ("query", "query_proj", "q_lin", "q_proj", "q"),
    "key": ("key", "key_proj", "k_lin", "k_proj", "k"),
    "value": ("value", "value_proj", "v_lin", "v_proj", "v"),
    "intermediate": ("intermediate.dense", "ffn.lin1", "ffn", "mlp.Wi", "DenseReluDense.wi", "wi", "fc1"),
    "output": ("output.dense", "ffn.lin2", "ffn_output", "mlp.Wo", "DenseReluDense.wo", "wo", "fc2"),
}
ATTENTION_OUTPUT = "attention.output.dense"


class TargetModuleError(ValueError):
    """A target module name that matches no weight matrix of the encoder."""


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
    """

    name: str
    module: nn.Module
    A: nn.Parameter
    B: nn.Parameter
    E: nn.Parameter | None
    scaling: float

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A', B) with the update equal to s B A': E is folded into A."""
        return (self.A if self.E is None else self.A * self.E), self.B


def find_adapter_pairs(model: nn.Module, adapter_name: str = "default") -> list[AdapterPair]:
    """Every matrix of ``model`` that carries the adapter, in model order.

    Raises:
        ValueError: the model has no such adapter.
    """
    pairs = []
    for path, module in model.named_modules():
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
        pairs.append(AdapterPair(path.removeprefix("base_model.model."), layer, A, B, E, scaling))
    if not pairs:
        raise ValueError(
            f"`model` ({type(model).__name__}) has no adapter named {adapter_name!r}; wrap it with peft.get_peft_model"
        )
    return pairs


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


def encoder_parameter_count(model: nn.Module) -> int:
    """Parameters of the encoder alone: embeddings and layers, no pooler and no head."""
    encoder = getattr(model, getattr(model, "base_model_prefix", ""), model)
    pooler = {id(p) for name, child in encoder.named_children() if "pooler" in name for p in child.parameters()}
    return sum(p.numel() for p in encoder.parameters() if id(p) not in pooler)


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
        kinds = dict.fromkeys(re.sub(r"(^|\.)\d+\.", r"\1*.", name) for name in available)
        raise TargetModuleError(
            f"no weight matrix of {type(model).__name__}'s encoder matches {', '.join(map(repr, unmatched))}; "
            f"it has {', '.join(kinds)}"
        )
    return [shape for name, shape in available.items() if name in chosen]


def _encoder_matrices(model: nn.Module) -> Iterator[tuple[str, MatrixShape]]:
    encoder_name = getattr(model, "base_model_prefix", "")
    encoder = getattr(model, encoder_name, None)
    root, prefix = (model, "") if encoder is None else (encoder, f"{encoder_name}.")
    for path, module in root.named_modules():
        features = matrix_features(module)
        if features and not any("pooler" in part for part in path.split(".")):
            yield prefix + path, MatrixShape(prefix + path, *features)


def _match_target(target: str, names: Sequence[str]) -> list[str]:
    """Paths ending in the target, else those of the role it stands for."""

    def ending_in(suffix: str) -> list[str]:
        return [name for name in names if name == suffix or name.endswith(f".{suffix}")]

    direct = ending_in(target) or ending_in(f"{target}.dense")
    for alias in PROJECTION_ALIASES.get(target, ()):
        direct = direct or ending_in(alias)
    if target.startswith("attention."):
        return direct
    return [name for name in direct if not name.endswith(f".{ATTENTION_OUTPUT}") or target == name]
