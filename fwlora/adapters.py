"""PEFT's LoRA layers as typed objects."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fwlora.shrinkage import squared_product_norm
from fwlora.targets import TargetPatterns


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
        """Rows of A."""
        return self.A.shape[0]

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (A', B) with the update equal to s B A': E is folded into A."""
        return (self.A if self.E is None else self.A * self.E), self.B


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside ``torch.compile`` and data-parallel wrappers."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def adapter_config(model: nn.Module, adapter_name: str) -> Any:
    """Return PEFT's configuration of the adapter; None where no PeftModel is around the model."""
    for module in unwrap(model).modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict) and adapter_name in configs:
            return configs[adapter_name]
    return None


def find_active_adapter(model: nn.Module) -> str:
    """Return the name of the one active adapter.

    Raises:
        ValueError: there is no adapter, or several are active.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    active = list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))
    if not layers:
        raise ValueError(f"`model` ({type(model).__name__}) has no adapter; wrap it with peft.get_peft_model")
    if len(active) != 1:
        raise ValueError(f"`adapter_name` is not given and {len(active)} adapters are active {active}; name one")
    return str(active[0])


def find_adapter_pairs(model: nn.Module, adapter_name: str = "default") -> list[AdapterPair]:
    """Find every matrix of ``model`` that carries the adapter, in model order.

    Raises:
        ValueError: the model has no such adapter, or one whose update is not s B A of two matrices (DoRA and other
            variants, a convolution, an embedding, fused attention, experts and other ``target_parameters``).
    """
    model = unwrap(model)
    pairs: list[AdapterPair] = []
    unsuitable: list[str] = []
    present: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            present.update([*module.lora_A, *module.lora_embedding_A])
            if adapter_name in module.lora_embedding_A:
                unsuitable.append(f"{_path_in_base(path)!r}: an embedding")
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
        name = _path_in_base(path)
        kind = _other_kind(layer, adapter_name, A)
        if kind:
            unsuitable.append(f"{name!r}: {kind}")
        pairs.append(AdapterPair(name, layer, A, B, E, scaling, adapter_name))
    if unsuitable:
        raise ValueError(
            f"{len(unsuitable)} matrices of `model` carry a variant of LoRA whose update is not s B A of one matrix "
            f"({'; '.join(unsuitable[:3])}); use plain LoRA on linear layers"
        )
    if not pairs:
        others = f"; it has {', '.join(map(repr, sorted(present)))}" if present else ""
        raise ValueError(
            f"`model` ({type(model).__name__}) has no adapter named {adapter_name!r}{others}; "
            "wrap it with peft.get_peft_model"
        )
    return pairs


def _other_kind(layer: Any, adapter_name: str, A: nn.Parameter) -> str | None:
    """Name what a layer's adapter is, where its update is not s B A of one matrix."""
    if isinstance(layer, ParamWrapper):
        return f"the parameter {layer.parameter_name!r} by `target_parameters`, as experts are"
    if isinstance(layer, MultiheadAttention):
        return "fused attention"
    if A.dim() != 2:
        return "a convolution"
    variant = getattr(layer, "lora_variant", {}).get(adapter_name)
    return None if variant is None else type(variant).__name__.removesuffix("Variant")


def _path_in_base(path: str) -> str:
    """Return the path of a module in the model that was adapted."""
    path = path.replace("_orig_mod.", "")
    return path.partition("base_model.model.")[2] or path


@torch.no_grad()
def resize_adapter(pair: AdapterPair, A: Tensor, B: Tensor) -> None:
    """Give a LoRA pair new factors of another rank, with the same scaling.

    Its parameters stay the same objects, so an optimizer keeps them; their gradients are dropped. With r' = 0 the
    matrix loses its adapter: its layer computes the base alone from then on.

    Args:
        pair: to be changed.
        A: shape (r', d_in).
        B: shape (d_out, r').
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
    """Write the pairs' ranks into the adapter's configuration, so that a saved adapter can be loaded."""
    config = adapter_config(model, pairs[0].adapter_name)
    if config is None:
        return
    kept: list[tuple[AdapterPair, Any]] = [(pair, pair.module) for pair in pairs if pair.rank > 0]
    paths = [_path_in_base(path) for path, _ in unwrap(model).named_modules()]
    patterns = TargetPatterns.make([pair.name for pair, _ in kept], paths)
    config.rank_pattern = {patterns.keys[pair.name]: pair.rank for pair, _ in kept}
    config.alpha_pattern = {patterns.keys[pair.name]: layer.lora_alpha[pair.adapter_name] for pair, layer in kept}
    config.r = max(config.rank_pattern.values())
    config.lora_alpha = max(config.alpha_pattern.values())
    names = patterns.target_modules
    config.target_modules = names if isinstance(names, str) else set(names)
    # The names say it all; PEFT refuses these beside a regular expression, and a start may need other ranks.
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.init_lora_weights = True


def check_attached(model: nn.Module, ranks: Mapping[str, int], head_modules: Sequence[str] = ()) -> None:
    """Check that adapters and fully trained modules are those that were planned.

    Args:
        model: PEFT's model.
        ranks: rank of every matrix that was to get an adapter, by path.
        head_modules: paths of the modules to be trained in full.

    Raises:
        ValueError: a matrix without its adapter, with another rank, or one too many; a module that PEFT trains because
            its path ends in a head's name.
    """
    attached = {pair.name: pair.rank for pair in find_adapter_pairs(model)}
    differing = [name for name in {**ranks, **attached} if ranks.get(name) != attached.get(name)]
    trained = [
        _path_in_base(path) for path, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)
    ]
    other = sorted(set(trained) - set(head_modules))
    if differing:
        name = differing[0]
        raise ValueError(
            f"PEFT gave {name!r} rank {attached.get(name, 0)} instead of {ranks.get(name, 0)}, as {len(differing)} "
            "matrices in all: the path of a matrix or of the head contains another's; rename the modules"
        )
    if other:
        raise ValueError(f"PEFT trains {other[0]!r} in full, since its path ends in the head's; rename one of them")


def save_adapter(model: Any, folder: str | Path, **options: Any) -> None:
    """Call ``model.save_pretrained`` with these options, also where AdaLoRA pruned a matrix to rank 0."""
    with warnings.catch_warnings():
        # PEFT takes empty factors for a sharded export that was not gathered.
        warnings.filterwarnings("ignore", message=r".*LoRA tensor\(s\) have invalid shape")
        model.save_pretrained(folder, **options)


@torch.no_grad()
def delta_norms(pairs: Sequence[AdapterPair]) -> Tensor:
    """Return the Frobenius norm of each pair's update s B A', shape (pairs,), from r x r products only."""
    norms = []
    for pair in pairs:
        A, B = (factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in pair.factors())
        norms.append(pair.scaling * squared_product_norm(A, B).clamp_min(0).sqrt())
    return torch.stack(norms)
