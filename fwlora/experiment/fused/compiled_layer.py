"""A post-norm transformer layer as matrix products and compiled kernels, forward and backward written out.

It computes what :class:`fwlora.experiment.fused.layer.FusedLayer` computes, in a few passes over rows where that one
starts hundreds of operations. Products read and write the type of products; all else is float32: residuals,
normalizations, softmax, and the adapters, whose factors are never rounded.

Dropout's masks are a hash of a seed, the row and the column, so that the backward pass makes them again instead of
reading them: every pass draws one seed for each place of dropout. A probability is rounded to a multiple of 2^-16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fwlora.experiment.fused.compiled import LANES, RANK_STEP, Kernels, drop_threshold, kept_scale
from fwlora.experiment.fused.layer import Hidden, LayerWeights, ObserveMatrices, group_names
from fwlora.experiment.fused.linear import Adapters, split_members
from fwlora.experiment.fused.read_model import LinearParts

# Drops nothing.
NO_SEED, NO_THRESHOLD = 0, 0


class CompiledGroup:
    """Linear layers of equal shape with one input, those with adapters first.

    Args:
        members: name -> weights; all adapters have the same dropout.
        scalings: s by name of the adapted members.
        dtype: of the products.
    """

    def __init__(self, members: dict[str, LinearParts], scalings: dict[str, float], dtype: torch.dtype) -> None:
        self.adapted, self.names = split_members(members)
        self.weights = [members[name].weight.detach().to(dtype) for name in self.names]
        self.d_out, self.d_in = self.weights[0].shape
        self.biases = _stack_biases([members[name].bias for name in self.names], self.d_out)
        dropout = max((members[name].dropout for name in self.adapted), default=0.0)
        self.threshold = drop_threshold(dropout)
        own = torch.tensor([scalings[name] for name in self.adapted], dtype=torch.float32)
        self._factors = {False: own, True: own * kept_scale(dropout)}

    def factors(self, *, dropped: bool) -> Tensor:
        """Return s, times dropout's 1 / (1 - p) where it is drawn, by adapted member."""
        return self._factors[dropped]

    def gather(self, factors: Sequence[tuple[Tensor, Tensor]]) -> Adapters | None:
        """Stack the members' A (r, d_in) and B^T (r, d_out), ranks padded with zeros; return None at rank 0."""
        rank = max((A.shape[0] for A, _ in factors), default=0)
        if rank == 0:
            return None
        padded = -(-rank // RANK_STEP) * RANK_STEP
        joint_A = torch.empty(len(factors), padded, self.d_in)
        joint_B = torch.empty(len(factors), padded, self.d_out)
        for place, (A, B) in enumerate(factors):
            own = A.shape[0]
            joint_A[place, :own], joint_B[place, :own] = A, B.T
            if own < padded:
                joint_A[place, own:], joint_B[place, own:] = 0.0, 0.0
        return Adapters(joint_A, joint_B)

    def scatter(
        self, gradients: tuple[Tensor, Tensor], factors: Sequence[tuple[Tensor, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the gradients of the single factors, from those of A and B^T as :meth:`gather` stacks them."""
        joint_A, joint_B = gradients
        return [
            (joint_A[place, : A.shape[0]], joint_B[place, : A.shape[0]].T.contiguous())
            for place, (A, _) in enumerate(factors)
        ]

    def multiply(self, X: Tensor) -> Tensor:
        """Return X W_i^T of all members, shape (members, T, d_out)."""
        Y = X.new_empty(len(self.names), X.shape[0], self.d_out)
        for weight, out in zip(self.weights, Y, strict=True):
            torch.mm(X, weight.T, out=out)
        return Y

    def multiply_back(self, G: Tensor) -> Tensor:
        """Return sum_i G_i W_i, shape (T, d_in)."""
        into = torch.mm(G[0], self.weights[0])
        for gradient, weight in zip(G[1:], self.weights[1:], strict=True):
            into.addmm_(gradient, weight)
        return into


@dataclass(frozen=True)
class TokenLayout:
    """Where the tokens of a batch lie: one example after the other, without padding.

    Attributes:
        bounds: example e has rows ``bounds[e]`` to ``bounds[e + 1]``; shape (batch + 1,).
        areas: numbers of attention weights per head before each example, by whether only first tokens attend.
        widest: tokens of the longest example.
        real: uint8 of shape (T,), 0 at padding; None where there is none.
    """

    bounds: Tensor
    areas: Mapping[bool, Tensor]
    widest: int
    real: Tensor | None = None

    @classmethod
    def make(cls, lengths: Tensor, real: Tensor | None = None) -> TokenLayout:
        """Return the layout of examples of these lengths, int64 of shape (batch,)."""
        areas = {True: _add_up(lengths), False: _add_up(lengths * lengths)}
        return cls(_add_up(lengths), areas, int(lengths.max()), real)

    @property
    def batch(self) -> int:
        """Return the number of examples."""
        return len(self.bounds) - 1

    @property
    def firsts(self) -> Tensor:
        """Return the rows of the first tokens, shape (batch,)."""
        return self.bounds[:-1]


def _add_up(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


@dataclass
class CompiledTape:
    """What the backward pass of a layer needs; shapes are those of ``kernels.c``."""

    layout: TokenLayout
    seeds: Mapping[str, np.ndarray]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    downs: dict[str, Tensor] = field(default_factory=dict)
    norms: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    heads: dict[str, Tensor] = field(default_factory=dict)
    P: Tensor | None = None
    slope: Tensor | None = None


@dataclass(frozen=True)
class _Through:
    """What a group's adapters add to the gradient at its input: D(low A), the sum over members."""

    low: Tensor | None = None
    A: Tensor | None = None
    count: int = 0
    rank: int = 0
    seeds: int | None = None
    threshold: int = NO_THRESHOLD

    def of_one(self) -> tuple[Tensor | None, Tensor | None, int, int | None, int]:
        """Return the arguments of a kernel that takes one member."""
        return self.low, self.A, self.rank, self.seeds, self.threshold


class CompiledLayer:
    """One encoder layer.

    Args:
        weights: of the layer.
        kernels: of the products' type.
        first_only: whether only the first token of every example is needed of the output.
    """

    def __init__(self, weights: LayerWeights, kernels: Kernels, *, first_only: bool) -> None:
        self.norms, self.heads = list(weights.norms), weights.heads
        self.dtype, self.first_only, self._kernels = kernels.dtype, first_only, kernels
        self._hidden = [(drop_threshold(p), kept_scale(p)) for p in weights.hidden_dropouts]
        self._attention = (drop_threshold(weights.attention_dropout), kept_scale(weights.attention_dropout))
        self.groups = {
            group: CompiledGroup({name: weights.linear[name] for name in names}, dict(weights.scalings), kernels.dtype)
            for group, names in group_names(first_only=first_only).items()
        }
        self._sites = {
            **{name: len(group.adapted) for name, group in self.groups.items() if group.adapted and group.threshold},
            **{"weights": 1, "hidden_0": 1, "hidden_1": 1},
        }

    @staticmethod
    def unsuitable(weights: LayerWeights) -> str | None:
        """Return what of a layer the kernels do not take; None where they compute it."""
        parts = weights.linear.values()
        if any(size % LANES for linear in parts for size in linear.weight.shape):
            return f"sizes that are no multiples of {LANES}"
        tensors = [linear.weight for linear in parts] + [norm.weight for norm in weights.norms]
        if any(tensor.device.type != "cpu" for tensor in tensors):
            return "weights that are not on the CPU"
        return "weights in another type than float32" if {t.dtype for t in tensors} != {torch.float32} else None

    def enter(self, X: Tensor, probability: float, bits: np.random.BitGenerator | None) -> Hidden:
        """Return the layers' input after its dropout; X (T, d) are embeddings in float32."""
        seed = NO_SEED if bits is None else _draw(bits, 1)[0]
        threshold = NO_THRESHOLD if bits is None else drop_threshold(probability)
        out, inputs = self._make_hidden(len(X))
        scale = kept_scale(probability) if threshold else 1.0
        self._kernels("drop", X.contiguous(), int(seed), threshold, scale, out, inputs, *X.shape)
        return Hidden(out, out if inputs is None else inputs)

    def lay_out(self, X: Tensor, attention_mask: Tensor | None, batch: int) -> tuple[Tensor, TokenLayout]:
        """Return the rows of real tokens, and their layout; all rows where a first token is not among them.

        Args:
            X: embeddings, shape (batch x width, d).
            attention_mask: shape (batch, width), 0 at padding; None where no example is padded.
            batch: examples.
        """
        whole = torch.full((batch,), len(X) // batch)
        if attention_mask is None:
            return X, TokenLayout.make(whole)
        real = attention_mask != 0
        if not bool(real[:, 0].all()):
            return X, TokenLayout.make(whole, real.to(torch.uint8).flatten())
        return X[real.flatten()], TokenLayout.make(real.sum(1))

    def draw(self, batch: int, rows: int, device: torch.device, bits: np.random.BitGenerator) -> dict[str, np.ndarray]:
        """Draw a seed for every place of dropout: a group's adapted members, attention weights, both branches."""
        seeds = iter(_draw(bits, sum(self._sites.values())))
        return {name: np.fromiter(seeds, np.uint64, count) for name, count in self._sites.items()}

    def forward(
        self,
        X: Hidden,
        batch: int,
        layout: TokenLayout,
        adapters: Mapping[str, Adapters | None],
        dropped: Mapping[str, np.ndarray],
        *,
        measured: bool = False,
    ) -> tuple[Hidden, CompiledTape]:
        """Return the layer's output, (T, d), or (batch, d) of the first tokens.

        Args:
            X: shape (T, d).
            batch: examples.
            layout: from :meth:`lay_out`.
            adapters: of every group.
            dropped: from :meth:`draw`; empty in evaluation.
            measured: has no effect here.
        """
        tape = CompiledTape(layout, dropped)
        residual = X.residual
        parts = self._complete("all", self._multiply("all", X.inputs, adapters, tape), adapters, tape)
        tape.heads = dict(zip(self.groups["all"].names, parts, strict=True))
        if self.first_only:
            residual = residual[layout.firsts]
            product = self._multiply("wanted", X.inputs[layout.firsts], adapters, tape)
            tape.heads["query"] = self._complete("wanted", product, adapters, tape)[0]
        context = self._attend(tape)
        U = self._add_norm(0, "attention_output", context, residual, adapters, tape)
        H = self._multiply("intermediate", U.inputs, adapters, tape)[0]
        activated = torch.empty_like(H)
        self._kernels("gelu", H, *self._added("intermediate", adapters, tape), activated, H, *H.shape)
        tape.slope = H
        return self._add_norm(1, "output", activated, U.residual, adapters, tape), tape

    def backward(
        self,
        G: Tensor,
        tape: CompiledTape,
        adapters: Mapping[str, Adapters | None],
        observe: ObserveMatrices | None,
        *,
        needs_input: bool,
    ) -> tuple[Tensor | None, dict[str, tuple[Tensor, Tensor]]]:
        """Return dL/dX, float32, or None where it is not needed, and the gradients of every group's joint factors.

        Args:
            G: gradient at the layer's output, float32.
            tape: of the forward pass.
            adapters: of every group.
            observe: takes every adapted matrix's input and output gradient; None where no estimator is recording.
            needs_input: whether dL/dX is needed.
        """
        found: dict[str, tuple[Tensor, Tensor]] = {}

        def through(name: str, G: Tensor) -> _Through:
            if observe is not None and self.groups[name].adapted:
                observe(self.groups[name].adapted, tape.inputs[name], G[: len(self.groups[name].adapted)])
            return self._differentiate(name, G, adapters[name], tape, found)

        dh, branch = self._norm_backward(1, G, None, _Through(), tape)
        part = through("output", branch[None])
        dH = self.groups["output"].multiply_back(branch[None])
        self._kernels("gelu_backward", dH, *part.of_one(), tape.slope, dH, *dH.shape)
        part = through("intermediate", dH[None])
        dh, branch = self._norm_backward(0, dh, self.groups["intermediate"].multiply_back(dH[None]), part, tape)
        part = through("attention_output", branch[None])
        d_context = self.groups["attention_output"].multiply_back(branch[None])
        if part.low is not None:
            sizes = (*d_context.shape, 1, 1, part.rank)
            self._kernels("expand", d_context, None, part.low, part.A, *sizes, part.seeds, part.threshold)
        joint, d_query = self._attend_backward(d_context, tape)
        part = through("all", joint)
        wanted = through("wanted", d_query[None]) if self.first_only else None
        if not needs_input:
            return None, found
        dX = self._add(None if self.first_only else dh, self.groups["all"].multiply_back(joint), part)
        if wanted is not None:
            d_wanted = self._add(dh, self.groups["wanted"].multiply_back(d_query[None]), wanted)
            dX.index_add_(0, tape.layout.firsts, d_wanted)
        return dX, found

    def _make_hidden(self, rows: int) -> tuple[Tensor, Tensor | None]:
        """Return what the kernels write rows to: float32, and the products' type where that is another."""
        size = self.norms[0].weight.shape[0]
        out = torch.empty(rows, size)
        return out, None if self.dtype == torch.float32 else torch.empty(rows, size, dtype=self.dtype)

    def _multiply(
        self,
        name: str,
        X: Tensor,
        adapters: Mapping[str, Adapters | None],
        tape: CompiledTape,
    ) -> Tensor:
        """Return the group's products, shape (members, T, d_out); keep what its adapters need."""
        group, own = self.groups[name], adapters[name]
        tape.inputs[name] = X
        if own is not None:
            seeds = tape.seeds.get(name)
            count, rank, _ = own.A.shape
            low = torch.empty(count, len(X), rank)
            factors = group.factors(dropped=seeds is not None)
            sizes = (len(X), group.d_in, rank, count, 0)
            self._kernels("project", X, own.A, low, *sizes, _address(seeds), group.threshold, factors)
            tape.downs[name] = low
        return group.multiply(X)

    def _complete(self, name: str, Y: Tensor, adapters: Mapping[str, Adapters | None], tape: CompiledTape) -> Tensor:
        """Add biases and what adapters add to a group's products, in place."""
        *added, rank = self._added(name, adapters, tape)
        own = adapters[name]
        count = 0 if own is None else len(own.A)
        self._kernels("expand", Y, *added, *Y.shape[1:], len(Y), count, rank, None, NO_THRESHOLD)
        return Y

    def _added(
        self, name: str, adapters: Mapping[str, Adapters | None], tape: CompiledTape
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, int]:
        """Return biases, low, B^T and rank: what a group has to add to its products."""
        own, biases = adapters[name], self.groups[name].biases
        return (biases, None, None, 0) if own is None else (biases, tape.downs[name], own.B, own.B.shape[1])

    def _attend(self, tape: CompiledTape) -> Tensor:
        Q, K, V = (tape.heads[name] for name in ("query", "key", "value"))
        layout, areas = tape.layout, tape.layout.areas[self.first_only]
        tape.P = torch.empty(self.heads * int(areas[-1]))
        context = torch.empty_like(Q)
        site = self._site("weights", self._attention, tape)
        places = (layout.real, layout.bounds, areas)
        self._kernels("attend", Q, K, V, *places, *site, context, tape.P, *self._sizes(layout, Q))
        return context

    def _sizes(self, layout: TokenLayout, Q: Tensor) -> tuple[int, ...]:
        return layout.batch, self.heads, int(self.first_only), layout.widest, Q.shape[1] // self.heads

    def _attend_backward(self, G: Tensor, tape: CompiledTape) -> tuple[Tensor, Tensor]:
        """Return the gradients of the group ``all``, shape (members, T, d), and of the queries."""
        Q, K, V = (tape.heads[name] for name in ("query", "key", "value"))
        names = self.groups["all"].names
        joint = K.new_empty(len(names), *K.shape)
        out = {"query": torch.empty_like(Q)} if self.first_only else {}
        out |= dict(zip(names, joint, strict=True))
        site = self._site("weights", self._attention, tape)
        gradients = (out["query"], out["key"], out["value"])
        places = (tape.layout.bounds, tape.layout.areas[self.first_only])
        self._kernels("attend_backward", G, Q, K, V, tape.P, *places, *site, *gradients, *self._sizes(tape.layout, Q))
        return joint, out["query"]

    def _add_norm(
        self,
        place: int,
        name: str,
        X: Tensor,
        residual: Tensor,
        adapters: Mapping[str, Adapters | None],
        tape: CompiledTape,
    ) -> Hidden:
        """Return LN(residual + D(group(X)))."""
        Y = self._multiply(name, X, adapters, tape)[0]
        norm = self.norms[place]
        out, inputs = self._make_hidden(len(Y))
        normal, rstd = torch.empty_like(out), torch.empty(len(Y))
        site = self._site(f"hidden_{place}", self._hidden[place], tape)
        affine = (norm.weight, norm.bias, norm.eps)
        added = self._added(name, adapters, tape)
        self._kernels("add_norm", Y, *added, *site, residual, *affine, out, inputs, normal, rstd, *Y.shape)
        tape.norms.append((normal, rstd))
        return Hidden(out, out if inputs is None else inputs)

    def _norm_backward(
        self, place: int, residual: Tensor, product: Tensor | None, part: _Through, tape: CompiledTape
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients at the residual, float32, and at the branch before its dropout."""
        normal, rstd = tape.norms[place]
        dh = torch.empty_like(normal)
        branch = torch.empty_like(dh, dtype=self.dtype)
        site = self._site(f"hidden_{place}", self._hidden[place], tape)
        statistics = (normal, rstd, self.norms[place].weight)
        self._kernels("norm_backward", residual, product, *part.of_one(), *statistics, *site, dh, branch, *dh.shape)
        return dh, branch

    def _differentiate(
        self,
        name: str,
        G: Tensor,
        own: Adapters | None,
        tape: CompiledTape,
        found: dict[str, tuple[Tensor, Tensor]],
    ) -> _Through:
        """Find the gradients of a group's joint factors from those at its outputs, G (members, T, d_out)."""
        if own is None:
            return _Through()
        group, X, seeds = self.groups[name], tape.inputs[name], tape.seeds.get(name)
        count, rank, _ = own.A.shape
        rows, address = len(X), _address(seeds)
        low = torch.empty(count, rows, rank)
        factors = group.factors(dropped=seeds is not None)
        stride = rows * group.d_out
        self._kernels("project", G, own.B, low, rows, group.d_out, rank, count, stride, None, NO_THRESHOLD, factors)
        dA, dB = torch.empty_like(own.A), torch.empty_like(own.B)
        self._kernels("reduce", low, X, dA, rows, group.d_in, rank, count, 0, address, group.threshold)
        self._kernels("reduce", tape.downs[name], G, dB, rows, group.d_out, rank, count, stride, None, NO_THRESHOLD)
        found[name] = (dA, dB)
        return _Through(low, own.A, count, rank, address, group.threshold)

    def _add(self, residual: Tensor | None, product: Tensor, part: _Through) -> Tensor:
        out = torch.empty(product.shape)
        added = (part.low, part.A, part.count, part.rank, part.seeds, part.threshold)
        self._kernels("add_gradients", residual, product, *added, out, *product.shape)
        return out

    def _site(self, name: str, dropout: tuple[int, float], tape: CompiledTape) -> tuple[int, int, float]:
        """Return seed, threshold and scale of a place; those of no dropout in evaluation."""
        seeds = tape.seeds.get(name)
        return (NO_SEED, NO_THRESHOLD, 1.0) if seeds is None else (int(seeds[0]), *dropout)


def _stack_biases(biases: Sequence[Tensor | None], size: int) -> Tensor | None:
    """Return the members' biases, zeros where one has none, shape (members, size); None where no member has one."""
    if all(bias is None for bias in biases):
        return None
    return torch.stack([torch.zeros(size) if bias is None else bias.detach() for bias in biases])


def _draw(bits: np.random.BitGenerator, count: int) -> np.ndarray:
    drawn: np.ndarray = bits.random_raw(count)
    return drawn


def _address(seeds: np.ndarray | None) -> int | None:
    return None if seeds is None else seeds.ctypes.data
