"""AdaLoRA's averages of sensitivity, and the scores of its triplets, of all matrices at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fwlora.adapters import AdapterPair

# Attributes of PEFT's allocator: sensitivity and its two moving averages, by parameter name.
_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
_KINDS = ("lora_A", "lora_B", "lora_E")


class TripletScores:
    """PEFT's arithmetic (Zhang et al., ICLR 2023, arXiv 2303.10512, equations 8 to 11) in few operations.

    Of every entry w of A, B and E: I = |w dL/dw|, its average I' = beta1 I' + (1 - beta1) I, the average of its
    uncertainty U' = beta2 U' + (1 - beta2) |I - I'|, and the score I' U'. A triplet's score is that of its singular
    value, and the means over its row of A and its column of B. All averages lie in one vector each; the dictionaries
    of PEFT's allocator hold parts of them.

    Args:
        pairs: AdaLoRA's matrices, in model order.
        allocator: PEFT's.
    """

    def __init__(self, pairs: Sequence[AdapterPair], allocator: Any) -> None:
        self.keys = [f"{pair.name}.lora_E.{allocator.adapter_name}" for pair in pairs]
        self._allocator = allocator
        sections: dict[tuple[str, torch.Size], list[int]] = defaultdict(list)
        for kind in _KINDS:
            for index, pair in enumerate(pairs):
                sections[kind, _parameter_of(pair, kind).shape].append(index)
        # Parameters of one kind and shape lie side by side, so that one operation takes the means of all.
        self._sections = [(kind, shape, len(indices)) for (kind, shape), indices in sections.items()]
        self._parameters = {
            self.keys[index].replace(".lora_E.", f".{kind}."): _parameter_of(pairs[index], kind)
            for (kind, _), indices in sections.items()
            for index in indices
        }
        self._places = self._find_places(pairs, sections)
        self._averages: list[Tensor] | None = None

    @staticmethod
    def _find_places(pairs: Sequence[AdapterPair], sections: Mapping[tuple[str, torch.Size], list[int]]) -> Tensor:
        """Return where among the sections' means those of each triplet are, shape (kinds, triplets)."""
        places: dict[str, dict[int, range]] = {kind: {} for kind in _KINDS}
        start = 0
        for (kind, _), indices in sections.items():
            for index in indices:
                places[kind][index] = range(start, start + pairs[index].rank)
                start += pairs[index].rank
        of_kinds = [[place for index in range(len(pairs)) for place in places[kind][index]] for kind in _KINDS]
        return torch.tensor(of_kinds, device=pairs[0].A.device)

    @torch.no_grad()
    def update(self, model: nn.Module | None = None) -> None:
        """Update the averages in place of PEFT's allocator; all parameters have their gradients.

        Args:
            model: that the allocator passes; not needed.
        """
        parameters = list(self._parameters.values())
        sensitivity, average, uncertainty = self._join_averages()
        torch.mul(_join(parameters), _join([cast(Tensor, parameter.grad) for parameter in parameters]), out=sensitivity)
        sensitivity.abs_()
        average.mul_(self._allocator.beta1).add_(sensitivity * (1 - self._allocator.beta1))
        deviation = (sensitivity - average).abs_()
        uncertainty.mul_(self._allocator.beta2).add_(deviation.mul_(1 - self._allocator.beta2))

    @torch.no_grad()
    def compute(self) -> Tensor:
        """Return the score of every triplet, in the order of the pairs and their rows of A."""
        _, average, uncertainty = self._join_averages()
        entries: Tensor = average * uncertainty
        means = []
        sizes = [count * shape.numel() for _, shape, count in self._sections]
        for (kind, shape, count), part in zip(self._sections, entries.split(sizes), strict=True):
            means.append(part.view(count, *shape).mean(dim=1 if kind == "lora_B" else 2).flatten())
        of_A, of_B, of_E = torch.cat(means)[self._places].unbind()
        return of_E + of_A + of_B

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return copies of the averages, by PEFT's names of them and of the parameters."""
        return {name: _copy(getattr(self._allocator, name)) for name in _AVERAGES}

    def load(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Continue with what :meth:`state` returned."""
        for name in _AVERAGES:
            setattr(self._allocator, name, _copy(state[name]))
        self._averages = None

    def _join_averages(self) -> list[Tensor]:
        """Return a vector of each average; the allocator's dictionaries hold parts of them, zeros at first."""
        if self._averages is None or next(iter(self._parameters)) not in self._allocator.ipt:
            self._averages = [self._join_held(getattr(self._allocator, name)) for name in _AVERAGES]
        return self._averages

    def _join_held(self, held: dict[str, Tensor]) -> Tensor:
        parts = [held.get(name, torch.zeros_like(parameter)) for name, parameter in self._parameters.items()]
        joint = _join(parts)
        split = joint.split([part.numel() for part in parts])
        held.update({name: own.view_as(part) for name, part, own in zip(self._parameters, parts, split, strict=True)})
        return joint


def _parameter_of(pair: AdapterPair, kind: str) -> nn.Parameter:
    parameter = {"lora_A": pair.A, "lora_B": pair.B, "lora_E": pair.E}[kind]
    assert parameter is not None
    return parameter


def _copy(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in values.items()}


def _join(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
