"""Squared gradient norms of frozen weight matrices, measured without giving any of them a gradient.

For an adapted module with input X (T, d_in) and gradient G (T, d_out) of the loss at its output, the gradient of its
frozen weight is G^T X. The backward pass has both, so autograd need not compute the weight's own gradient.

    exact     ||G^T X||_F^2                                         one weight-gradient product per module
    sketch    ||G^T (X P)||_F^2,  P (d_in, k), E[P P^T] = I         2 k / d of that; unbiased
    adapter   ||dL/dB||_F^2 d_in / (s^2 ||A||_F^2)                  a norm; biased where A aligns with the gradient

Every estimator sums its product over repeated calls of a module, micro-batches and processes *before* the norm: the
gradient of a step is one sum, and a mean of norms is another quantity. Processes are averaged, as data-parallel
training averages gradients.

Only what ``backward()`` adds to the adapters' ``.grad`` is the step's gradient: a pass of ``torch.autograd.grad``, as
for a saliency map, is observed but dropped, since it ends without having reached any ``.grad``.
"""

from __future__ import annotations

import hashlib
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fwlora.adapters import AdapterPair
from fwlora.passes import IdleHook, StepSums, current_pass, in_functional_transform


class GradientEstimator(ABC):
    """Sum one product per adapted matrix while measuring; the base of the three estimators.

    Args:
        pairs: the adapted matrices; norms come in their order.

    Attributes:
        measuring: whether gradients are recorded; otherwise hooks return early.
    """

    def __init__(self, pairs: Sequence[AdapterPair]) -> None:
        self.measuring = False
        self._pairs = list(pairs)
        self._sums = StepSums(len(pairs))
        factors = [pair.B if pair.B.requires_grad else pair.A for pair in pairs]
        self._handles: list[Any] = [
            factor.register_post_accumulate_grad_hook(self._count_pass) for factor in factors if factor.requires_grad
        ]
        self._handles += self._register()

    def start(self, step: int) -> None:
        """Start to record gradients, for optimizer step ``step``."""
        self.measuring = True

    def take_squared_norms(self, loss_scale: float | Tensor = 1.0) -> Tensor:
        """Return the estimate of ||grad W||_F^2 of everything since :meth:`start`, shape (matrices,).

        A matrix that no backward pass reached has the gradient 0. With ``torch.distributed`` initialized this is a
        collective: every process has to call it.

        Args:
            loss_scale: factor of the loss, such as a ``GradScaler``'s scale.

        Raises:
            RuntimeError: no backward pass reached any matrix, or one contained what cannot be measured.
        """
        sums = self._sums.of_step()
        reference = next((product for product in sums if product is not None), None)
        if reference is None:
            raise RuntimeError(
                "`step` was called before any backward pass reached the adapted modules; call it once between "
                "loss.backward() and optimizer.step(), on the model that the adapter is active in"
            )
        products = [
            reference.new_zeros(self._shape(pair)) if product is None else product
            for pair, product in zip(self._pairs, sums, strict=True)
        ]
        self._drop()
        self.measuring = False
        products = _average_over_processes(products)
        # On a GPU the norms of all matrices are one kernel.
        norms = torch.stack([norm.to(reference.device) for norm in torch._foreach_norm(products)])
        return self._rescale((norms / loss_scale).square())

    def close(self) -> None:
        """Remove the hooks; the modules are as before."""
        self.measuring = False
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._drop()

    def _drop(self) -> None:
        """Forget what was recorded."""
        self._sums.drop()

    def _add(self, index: int, product: Tensor) -> None:
        """Add to the sum of one matrix; ``product`` must not be used afterwards."""
        self._sums.add(index, product.float() if product.dtype in (torch.bfloat16, torch.float16) else product)

    def _count_pass(self, _: Tensor) -> None:
        """Count the running pass: it has just added to the ``.grad`` of an adapter."""
        if self.measuring:
            self._sums.count_pass()

    @abstractmethod
    def _register(self) -> list[Any]:
        """Place the hooks and return their handles."""

    @abstractmethod
    def _shape(self, pair: AdapterPair) -> tuple[int, int]:
        """Return the shape of a matrix's product."""

    @abstractmethod
    def _rescale(self, squared_norms: Tensor) -> Tensor:
        """Convert the products' squared norms to the estimate of ||grad W||_F^2, both of shape (matrices,)."""


class PassEstimator(GradientEstimator):
    """Sum G^T times what is kept of X over passes through a module; the base of ``exact`` and ``sketch``.

    G is taken at the output of the adapted module: at the base layer alone, autograd computes no gradient where the
    input needs none, which would miss the first layer's projections. Under gradient checkpointing the first forward
    pass, which has no gradient, is not recorded.

    The gradient of a gradient's norm (a penalty made with ``create_graph=True``) reaches W by a second path, through
    dL/dX = G W, which G^T X does not contain; it is refused.
    """

    def __init__(self, pairs: Sequence[AdapterPair]) -> None:
        # Passes that went through the graph of another pass, and passes that left a graph which cannot be watched.
        self._second_order: set[int] = set()
        self._unwatched: set[int] = set()
        super().__init__(pairs)

    def take_squared_norms(self, loss_scale: float | Tensor = 1.0) -> Tensor:
        """Return the estimate; see :meth:`GradientEstimator.take_squared_norms`."""
        wrong = self._second_order & self._sums.counted or self._unwatched - self._sums.counted
        if wrong:
            self._drop()
            raise RuntimeError(
                "the step's gradient contains the gradient of a gradient (a penalty made with create_graph=True), "
                "whose part in the frozen weights' gradients cannot be measured from inputs and outputs; use "
                "estimator='adapter', or leave the penalty out while measuring"
            )
        return super().take_squared_norms(loss_scale)

    def _drop(self) -> None:
        super()._drop()
        self._second_order.clear()
        self._unwatched.clear()

    def observe(self, index: int, inputs: Tensor, output_gradient: Tensor) -> None:
        """Add one pass of module ``index``: X (..., d_in) and G (..., d_out).

        Forward paths that bypass module hooks, such as a fused layer, call this themselves.
        """
        self._accumulate(index, self._compress_input(inputs), output_gradient)

    def _register(self) -> list[Any]:
        return [
            pair.module.register_forward_hook(ForwardHook(self, index), with_kwargs=True)
            for index, pair in enumerate(self._pairs)
        ]

    # Outside torch.compile's graphs, which then break in steps that measure alone.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def watch(self, index: int, module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        """Record the gradient at the output of a call of module ``index``, once a backward pass brings it."""
        # Ignore replicas of the module, passes with another adapter active, and transforms of torch.func, whose
        # gradients no step uses.
        pair, layer = self._pairs[index], cast(Any, module)
        ours = module is pair.module and pair.adapter_name in layer.active_adapters and not layer.disable_adapters
        if not (ours and torch.is_grad_enabled() and output.requires_grad) or in_functional_transform():
            return
        compressed = self._compress_input(inputs)

        def record(gradient: Tensor) -> None:
            if not self.measuring:
                return
            if gradient.requires_grad:
                gradient.register_hook(lambda _: self._second_order.add(current_pass()))
            elif torch.is_grad_enabled():
                self._unwatched.add(current_pass())
            self._accumulate(index, compressed, gradient)

        output.register_hook(record)

    def _compress_input(self, inputs: Tensor) -> Tensor:
        return self._compress(inputs.detach().reshape(-1, inputs.shape[-1]))

    @abstractmethod
    def _compress(self, X: Tensor) -> Tensor:
        """Return what is kept of X (T, d_in) until its gradient is known: shape (T, any)."""

    @abstractmethod
    def _product_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the type to multiply in, where G and what is kept of X promote to ``dtype``."""

    def _accumulate(self, index: int, compressed: Tensor, output_gradient: Tensor) -> None:
        if not self.measuring:
            return
        G = output_gradient.detach().reshape(-1, output_gradient.shape[-1])
        if torch.is_autocast_enabled(G.device.type):  # a backward pass inside the context
            with torch.autocast(G.device.type, enabled=False):
                self._add(index, self._multiply(compressed, G))
        else:
            self._add(index, self._multiply(compressed, G))

    def _multiply(self, compressed: Tensor, G: Tensor) -> Tensor:
        """Return what is kept of X, transposed, times G (T, d_out)."""
        dtype = self._product_dtype(torch.promote_types(G.dtype, compressed.dtype))
        # X^T G, not G^T X: on a CPU a short, wide result is faster than a tall, narrow one.
        return compressed.to(dtype).T @ G.to(dtype)


class ForwardHook:
    """Hand the calls of one module to an estimator that is measuring; its copy, in a copied model, does nothing.

    Args:
        estimator: that watches the call.
        index: of the module.
    """

    def __init__(self, estimator: PassEstimator, index: int) -> None:
        self.estimator, self.index = estimator, index

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """Let the estimator watch one call of the module."""
        if self.estimator.measuring:
            self.estimator.watch(self.index, module, args[0] if args else kwargs["x"], output)

    def __reduce__(self) -> tuple[Any, ...]:
        return IdleHook, ()


class ExactEstimator(PassEstimator):
    """||G^T X||_F^2, the reference; it keeps every module's input until its backward pass."""

    def _compress(self, X: Tensor) -> Tensor:
        return X

    def _product_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.promote_types(dtype, torch.float32)

    def _shape(self, pair: AdapterPair) -> tuple[int, int]:
        return pair.A.shape[1], pair.B.shape[0]

    def _rescale(self, squared_norms: Tensor) -> Tensor:
        return squared_norms


class SketchProducts:
    """The two products of a sketch, by torch's operations; a loop with kernels of its own overrides them."""

    def compress(self, X: Tensor, signs: Tensor) -> Tensor:
        """Return X S for X (T, d_in) and S (d_in, k): shape (T, k)."""
        return X @ signs

    def reduce(self, compressed: Tensor, G: Tensor) -> Tensor | None:
        """Return (X S)^T G for G (T, d_out), shape (k, d_out); None leaves it to the estimator."""
        return None


class SketchEstimator(PassEstimator):
    r"""||G^T (X P)||_F^2 with P = S / sqrt(k), S (d_in, k) of random signs: unbiased, because E[P P^T] = I.

    With M = G^T X the variance is (2 / k) (||M^T M||_F^2 - sum_i (M^T M)_ii^2) (Hutchinson's estimator with Rademacher
    entries); Gaussian entries would lose the second term and vary more. S is drawn once per measured step and width,
    from (seed, step, d_in) alone: the same on all processes and after a resume, and no other stream is touched. Only
    X S (T, k) is kept from forward to backward.

    Args:
        size: k.
        seed: of all draws.
        products: makes the products of a pass.
    """

    def __init__(
        self,
        pairs: Sequence[AdapterPair],
        size: int,
        seed: int = 0,
        products: SketchProducts | None = None,
    ) -> None:
        self.size, self.seed, self.products = size, seed, products or SketchProducts()
        self._step = 0
        self._signs: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}
        # Query, key and value read one tensor, whose sketch is computed once.
        self._latest: tuple[weakref.ref[Tensor], int, Tensor] | None = None
        super().__init__(pairs)

    def start(self, step: int) -> None:
        """Start to record gradients; the signs depend on ``step``."""
        super().start(step)
        self._step = step

    def take_squared_norms(self, loss_scale: float | Tensor = 1.0) -> Tensor:
        """Return the estimate, and free what was kept for the step."""
        self._signs.clear()
        self._latest = None
        return super().take_squared_norms(loss_scale)

    @torch.no_grad()
    def _compress_input(self, inputs: Tensor) -> Tensor:
        version = inputs._version
        if self._latest is not None and self._latest[0]() is inputs and self._latest[1] == version:
            return self._latest[2]
        compressed = super()._compress_input(inputs)
        self._latest = (weakref.ref(inputs), version, compressed)
        return compressed

    def _compress(self, X: Tensor) -> Tensor:
        return self.products.compress(X, self._draw_signs(X.shape[-1], X.device, X.dtype))

    def _multiply(self, compressed: Tensor, G: Tensor) -> Tensor:
        made = self.products.reduce(compressed, G)
        return super()._multiply(compressed, G) if made is None else made

    def _draw_signs(self, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Draw S for one input width; its entries, -1 and 1, are exact in every floating-point type."""
        key = (width, device, dtype)
        if key not in self._signs:
            digest = hashlib.blake2b(f"{self.seed}:{self._step}:{width}".encode(), digest_size=4).digest()
            generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "big"))
            # A draw gives eight signs: the top bit of every byte of a 64-bit word.
            words = torch.empty(-(-width * self.size // 8), device=device, dtype=torch.int64)
            words.random_(-(2**63), None, generator=generator)
            signs = words.view(torch.int8)[: width * self.size].bitwise_right_shift(7).bitwise_or(1)
            self._signs[key] = signs.view(width, self.size).to(dtype)
        return self._signs[key]

    def _product_dtype(self, dtype: torch.dtype) -> torch.dtype:
        # bfloat16 has float32's range, and its rounding is small beside the sketch's variance; float16 would overflow
        # in the sum.
        return torch.float32 if dtype == torch.float16 else dtype

    def _shape(self, pair: AdapterPair) -> tuple[int, int]:
        return self.size, pair.B.shape[0]

    def _rescale(self, squared_norms: Tensor) -> Tensor:
        return squared_norms / self.size


class AdapterEstimator(GradientEstimator):
    """||dL/dB||_F^2 d_in / (s^2 ||A||_F^2), from the gradient that the adapter gets anyway.

    dL/dB = s grad W A^T, so this is ||grad W||_F^2 in expectation while A is random, as it is at the start. It is
    recorded at B in each backward pass, so that a loop which clips before ``step`` measures unclipped gradients.
    """

    def __init__(self, pairs: Sequence[AdapterPair]) -> None:
        super().__init__(pairs)
        factors = [pair.A.shape[1] / pair.scaling**2 for pair in pairs]
        self._factors = torch.tensor(factors, device=pairs[0].A.device, dtype=torch.float64)

    def _register(self) -> list[Any]:
        hooked = [(index, pair.B) for index, pair in enumerate(self._pairs) if pair.B.requires_grad]
        return [B.register_hook(self._make_hook(index)) for index, B in hooked]

    def _make_hook(self, index: int) -> Callable[[Tensor], None]:
        def record(gradient: Tensor) -> None:
            if self.measuring:
                self._add(index, gradient.detach().clone())

        return record

    def _shape(self, pair: AdapterPair) -> tuple[int, int]:
        return pair.B.shape[0], pair.B.shape[1]

    def _rescale(self, squared_norms: Tensor) -> Tensor:
        norms = torch._foreach_norm([pair.A.detach() for pair in self._pairs])
        norms_A = torch.stack([norm.to(squared_norms) for norm in norms])
        return squared_norms * self._factors.to(squared_norms) / norms_A.square()


def count_processes() -> int:
    """Return the number of processes of ``torch.distributed``; 1 where it is not initialized."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _average_over_processes(products: list[Tensor]) -> list[Tensor]:
    """Average every product over processes, in one collective; return them as they are where there is one process."""
    processes = count_processes()
    if processes == 1:
        return products
    flat = torch.cat([product.flatten() for product in products])
    dist.all_reduce(flat)
    flat /= processes
    parts = flat.split([product.numel() for product in products])
    return [part.view_as(product) for part, product in zip(parts, products, strict=True)]
