"""A post-norm transformer layer of a frozen encoder with adapters, forward and backward written out.

    U = LN1(X + D(attention(X)))        Z = LN2(U + D(W2 gelu(W1 U)))

Autograd would make a new tensor for every residual's gradient and every scaling; here products add gradients into one
tensor, and scalings are factors of products. Where only the first token of the output is needed, the other tokens' keys
and values alone are computed, since the gradients of everything else would be zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fwlora.experiment.fused.dropout import DropoutMask, draw_dropped
from fwlora.experiment.fused.linear import Adapters, FusedGroup, GroupTape
from fwlora.experiment.fused.read_model import LinearParts

# Takes the names of matrices with one input X (T, d_in), and the gradients G (names, T, d_out) at their outputs.
ObserveMatrices = Callable[[Sequence[str], Tensor, Tensor], None]
# torch's CPU softmax is not vectorized below the width of a vector register.
NARROW = 16


@dataclass(frozen=True)
class Norm:
    """A frozen layer normalization; weight and bias have shape (d,)."""

    weight: Tensor
    bias: Tensor
    eps: float

    def forward(self, X: Tensor) -> tuple[Tensor, NormTape]:
        """Normalize X (T, d) over d."""
        Y, mean, rstd = torch.native_layer_norm(X, [X.shape[-1]], self.weight, self.bias, self.eps)
        return Y, NormTape(X, mean, rstd)

    def backward(self, G: Tensor, tape: NormTape) -> Tensor:
        """Return dL/dX (T, d) from the gradient at the output, G (T, d)."""
        return torch.ops.aten.native_layer_norm_backward(
            G, tape.X, [G.shape[-1]], tape.mean, tape.rstd, self.weight, self.bias, [True, False, False]
        )[0]


@dataclass(frozen=True)
class NormTape:
    """What the backward pass of a normalization needs: X (T, d), mean and rstd (T, 1)."""

    X: Tensor
    mean: Tensor
    rstd: Tensor


@dataclass(frozen=True)
class LayerWeights:
    """The weights and settings of a layer.

    Attributes:
        linear: ``query``, ``key``, ``value``, ``attention_output``, ``intermediate`` and ``output``.
        scalings: s of those that carry an adapter.
        norms: after attention and after the feed-forward.
        heads: attention heads.
        hidden_dropouts: probabilities after the attention output and after the feed-forward.
        attention_dropout: probability on attention weights.
    """

    linear: Mapping[str, LinearParts]
    scalings: Mapping[str, float]
    norms: Sequence[Norm]
    heads: int
    hidden_dropouts: Sequence[float]
    attention_dropout: float


class Hidden(NamedTuple):
    """What passes from layer to layer, twice: as residuals, and in the type of the products; shape (T, d)."""

    residual: Tensor
    inputs: Tensor


def group_names(*, first_only: bool) -> dict[str, list[str]]:
    """Return the linear layers by group: equal shapes and one input.

    Args:
        first_only: whether queries are needed of first tokens alone, the group ``wanted``.
    """
    grouped = {"attention_output": ["attention_output"], "intermediate": ["intermediate"], "output": ["output"]}
    return grouped | (
        {"wanted": ["query"], "all": ["key", "value"]} if first_only else {"all": ["query", "key", "value"]}
    )


class AttentionTape(NamedTuple):
    """Heads, shape (batch x heads, queries or width, d), and weights before and after dropout, the latter unscaled."""

    Q: Tensor
    K: Tensor
    V: Tensor
    P: Tensor
    kept: Tensor


@dataclass
class LayerTape:
    """What the backward pass of one layer needs."""

    batch: int
    width: int
    dropped: Mapping[str, DropoutMask]
    groups: dict[str, GroupTape] = field(default_factory=dict)
    norms: list[NormTape] = field(default_factory=list)
    attention: AttentionTape | None = None
    pre_activation: Tensor | None = None


class FusedLayer:
    """One encoder layer.

    Args:
        weights: of the layer.
        dtype: to multiply in; residuals and normalizations keep the type of the layer's input.
        first_only: whether only the first token of every example is needed of the output.
    """

    def __init__(self, weights: LayerWeights, dtype: torch.dtype, *, first_only: bool) -> None:
        self.norms, self.heads = list(weights.norms), weights.heads
        self.hidden_dropouts, self.attention_dropout = weights.hidden_dropouts, weights.attention_dropout
        self.dtype, self.first_only = dtype, first_only
        self.groups = {
            group: FusedGroup({name: weights.linear[name] for name in names}, dict(weights.scalings), dtype)
            for group, names in group_names(first_only=first_only).items()
        }

    def enter(self, X: Tensor, probability: float, bits: np.random.BitGenerator | None) -> Hidden:
        """Return the layers' input after its dropout; X are embeddings, shape (T, d)."""
        drawn = {} if bits is None else draw_dropped({"X": (X.numel(), probability)}, X.device, bits)
        return self._make_hidden(drawn["X"].zero_(X * drawn["X"].scale) if drawn else X)

    def lay_out(self, X: Tensor, attention_mask: Tensor | None, batch: int) -> tuple[Tensor, Tensor | None]:
        """Return all rows, and what is added to attention scores: lowest numbers at padding.

        Args:
            X: embeddings, shape (batch x width, d).
            attention_mask: shape (batch, width), 0 at padding; None where no example is padded.
            batch: examples.

        Returns:
            X, and the addend of shape (batch x heads, 1, width), or None.
        """
        if attention_mask is None:
            return X, None
        bias = torch.zeros_like(attention_mask[:, None], dtype=self.dtype)
        bias.masked_fill_(attention_mask[:, None] == 0, torch.finfo(bias.dtype).min)
        return X, bias.repeat_interleave(self.heads, dim=0)

    def draw(self, batch: int, rows: int, device: torch.device, bits: np.random.BitGenerator) -> dict[str, DropoutMask]:
        """Draw the layer's dropouts by where they act: a group's name, ``weights``, ``hidden_0`` or ``hidden_1``."""
        wanted = batch if self.first_only else rows
        requests = {
            name: (len(group.adapted) * (rows if name == "all" else wanted) * group.d_in, group.dropout)
            for name, group in self.groups.items()
            if group.adapted
        }
        requests["weights"] = (wanted * self.heads * (rows // batch), self.attention_dropout)
        for place, (norm, probability) in enumerate(zip(self.norms, self.hidden_dropouts, strict=True)):
            requests[f"hidden_{place}"] = (wanted * norm.weight.shape[0], probability)
        return draw_dropped(requests, device, bits)

    def forward(
        self,
        X: Hidden,
        batch: int,
        layout: Tensor | None,
        adapters: Mapping[str, Adapters | None],
        dropped: Mapping[str, DropoutMask],
        *,
        measured: bool = False,
    ) -> tuple[Hidden, LayerTape]:
        """Return the layer's output, shape (batch x width, d), or (batch, d) of the first tokens.

        Args:
            X: shape (batch x width, d).
            batch: examples.
            layout: from :meth:`lay_out`.
            adapters: of every group.
            dropped: from :meth:`draw`; empty in evaluation.
            measured: whether the backward pass is to be observed.
        """
        width = X.residual.shape[0] // batch
        tape = LayerTape(batch, width, dropped)
        wanted = X.residual.view(batch, width, -1)[:, 0].contiguous() if self.first_only else X.residual
        parts = self._split(self._forward_group("all", X.inputs, adapters, tape), batch)
        heads = dict(zip(self.groups["all"].names, parts, strict=True))
        if self.first_only:
            heads["query"] = self._split(self._forward_group("wanted", wanted.to(self.dtype), adapters, tape), batch)[0]
        Q, K, V = (heads[name] for name in ("query", "key", "value"))
        context, P, kept = attend(Q, K, V, layout, dropped.get("weights"))
        tape.attention = AttentionTape(Q, K, V, P, kept)
        # The next two groups may overwrite their inputs unless gradients are being recorded.
        consume = not measured
        context = self._merge(context[None], batch)[0]
        U = self._add_and_normalize(0, "attention_output", context, wanted, adapters, tape, consume=consume)
        H = self._forward_group("intermediate", U.inputs, adapters, tape)[0]
        tape.pre_activation = H
        activated = torch.nn.functional.gelu(H)
        return self._add_and_normalize(1, "output", activated, U.residual, adapters, tape, consume=consume), tape

    def backward(
        self,
        G: Tensor,
        tape: LayerTape,
        adapters: Mapping[str, Adapters | None],
        observe: ObserveMatrices | None,
        *,
        needs_input: bool,
    ) -> tuple[Tensor | None, dict[str, tuple[Tensor, Tensor]]]:
        """Return dL/dX, or None where it is not needed, and the gradients of every group's joint factors.

        Args:
            G: gradient at the layer's output; may be changed in place.
            tape: of the forward pass.
            adapters: of every group.
            observe: takes every adapted matrix's input and output gradient; None where no estimator is recording.
            needs_input: whether dL/dX is needed.
        """
        found: dict[str, tuple[Tensor, Tensor]] = {}

        def through(name: str, G: Tensor, into: Tensor | None = None, *, needed: bool = True) -> Tensor | None:
            """Return the gradient at a group's input, added to ``into`` by the products where types agree."""
            group, group_tape = self.groups[name], tape.groups[name]
            if observe is not None and group.adapted:
                observe(group.adapted, group_tape.inputs, G[: len(group.adapted)])
            same = into is None or into.dtype == self.dtype
            target = into if same else None
            dX, gradients = group.backward(G, group_tape, adapters[name], target, needs_input=needed)
            if gradients is not None:
                found[name] = gradients
            return dX if same or into is None or dX is None else into.add_(dX)

        dZ = self.norms[1].backward(G, tape.norms[1])
        dH = through("output", self._through_dropout(1, dZ, tape)[None])
        assert dH is not None and tape.pre_activation is not None
        dH = torch.ops.aten.gelu_backward(dH, tape.pre_activation)
        dU = through("intermediate", dH[None], dZ)
        assert dU is not None
        dU = self.norms[0].backward(dU, tape.norms[0])
        d_context = through("attention_output", self._through_dropout(0, dU, tape)[None])
        assert d_context is not None
        assert tape.attention is not None
        joint = tape.attention.K.new_empty(len(self.groups["all"].names), *tape.attention.K.shape)
        d_context = self._split(d_context[None], tape.batch)[0]
        dQ = attend_backward(
            d_context,
            tape.attention,
            tape.dropped.get("weights"),
            dict(zip(self.groups["all"].names, joint, strict=True)),
        )
        joint = self._merge(joint, tape.batch)
        if not self.first_only:
            return through("all", joint, dU, needed=needs_input), found
        d_wanted = through("wanted", self._merge(dQ[None], tape.batch), dU, needed=needs_input)
        dX = through("all", joint, needed=needs_input)
        if dX is not None and d_wanted is not None:
            dX = dX.to(d_wanted.dtype)
            dX.view(tape.batch, tape.width, -1)[:, 0].add_(d_wanted)
        return dX, found

    def _forward_group(
        self,
        name: str,
        X: Tensor,
        adapters: Mapping[str, Adapters | None],
        tape: LayerTape,
        multiple: float = 1.0,
        *,
        consume: bool = False,
    ) -> Tensor:
        """Return the group's outputs, shape (members, T, d_out)."""
        group = self.groups[name]
        dropped = tape.dropped.get(name)
        Y, tape.groups[name] = group.forward(X, adapters[name], dropped, multiple, consume=consume)
        return Y

    def _add_and_normalize(
        self,
        place: int,
        name: str,
        X: Tensor,
        residual: Tensor,
        adapters: Mapping[str, Adapters | None],
        tape: LayerTape,
        *,
        consume: bool,
    ) -> Hidden:
        """Return LN(residual + D(group(X))); the product has the dropout's scale as a factor."""
        dropped = tape.dropped.get(f"hidden_{place}")
        scale = 1.0 if dropped is None else dropped.scale
        Y = self._forward_group(name, X, adapters, tape, scale, consume=consume)[0]
        if dropped is not None:
            dropped.zero_(Y)
        Y, norm_tape = self.norms[place].forward(Y.add_(residual) if Y.dtype == residual.dtype else residual + Y)
        tape.norms.append(norm_tape)
        return self._make_hidden(Y)

    def _make_hidden(self, residual: Tensor) -> Hidden:
        return Hidden(residual, residual.to(self.dtype))

    def _through_dropout(self, place: int, G: Tensor, tape: LayerTape) -> Tensor:
        dropped = tape.dropped.get(f"hidden_{place}")
        return G.to(self.dtype) if dropped is None else dropped.zero_((G * dropped.scale).to(self.dtype))

    def _split(self, X: Tensor, batch: int) -> Tensor:
        """Reshape (n, batch x width, d) to (n, batch x heads, width, d / heads), contiguous."""
        count, rows, size = X.shape
        parts = X.view(count, batch, rows // batch, self.heads, size // self.heads).transpose(2, 3)
        return parts.reshape(count, batch * self.heads, rows // batch, size // self.heads)

    def _merge(self, X: Tensor, batch: int) -> Tensor:
        """Invert :meth:`_split`."""
        count, _, width, size = X.shape
        parts = X.view(count, batch, self.heads, width, size).transpose(2, 3)
        return parts.reshape(count, batch * width, self.heads * size)


def attend(
    Q: Tensor, K: Tensor, V: Tensor, bias: Tensor | None, dropped: DropoutMask | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return softmax(Q K^T / sqrt(d) + bias) V, and the weights before and after dropout, the latter unscaled.

    Args:
        Q: shape (batch x heads, queries, d).
        K: shape (batch x heads, width, d).
        V: shape (batch x heads, width, d).
        bias: shape (batch x heads, 1, width), or None.
        dropped: of the weights, or None.
    """
    scores = torch.baddbmm(
        Q.new_empty(1, 1, 1) if bias is None else bias,
        Q,
        K.mT,
        beta=0.0 if bias is None else 1.0,
        alpha=1 / math.sqrt(Q.shape[-1]),
    )
    P = _softmax(scores)
    if dropped is None:
        return torch.bmm(P, V), P, P
    kept = dropped.zero_(P.clone())
    return torch.baddbmm(V.new_empty(1, 1, 1), kept, V, beta=0.0, alpha=dropped.scale), P, kept


def attend_backward(G: Tensor, tape: AttentionTape, dropped: DropoutMask | None, out: Mapping[str, Tensor]) -> Tensor:
    """Write dK and dV into ``out["key"]`` and ``out["value"]``; return dQ, which is ``out["query"]`` if that exists.

    Args:
        G: dL/d(context), shape (batch x heads, queries, d).
        tape: of the forward pass.
        dropped: of the weights, or None.
        out: tensors to write to, by name.
    """
    Q, K, V, P, kept = tape
    scale = 1.0 if dropped is None else dropped.scale
    nothing = G.new_empty(1, 1, 1)
    torch.baddbmm(nothing, kept.mT, G, beta=0.0, alpha=scale, out=out["value"])
    dP = torch.baddbmm(nothing, G, V.mT, beta=0.0, alpha=scale)
    if dropped is not None:
        dropped.zero_(dP)
    dS = _softmax_backward(dP, P)
    factor = 1 / math.sqrt(Q.shape[-1])
    torch.baddbmm(nothing, dS.mT, Q, beta=0.0, alpha=factor, out=out["key"])
    return torch.baddbmm(nothing, dS, K, beta=0.0, alpha=factor, out=out.get("query"))


def _softmax(scores: Tensor) -> Tensor:
    if scores.is_cuda or scores.shape[-1] >= NARROW:
        return torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
    weights = scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    return weights.div_(weights.sum(-1, keepdim=True))


def _softmax_backward(dP: Tensor, P: Tensor) -> Tensor:
    if P.is_cuda or P.shape[-1] >= NARROW:
        return torch.ops.aten._softmax_backward_data(dP, P, -1, P.dtype)
    weighted = dP.mul_(P)
    return weighted.addcmul_(P, weighted.sum(-1, keepdim=True), value=-1)
