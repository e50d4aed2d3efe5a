"""Fisher-weighted shrinkage for a training loop, as one object."""

from __future__ import annotations

import copy
import logging
import math
import weakref
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from fwlora.adapters import (
    AdapterPair,
    adapter_config,
    delta_norms,
    find_active_adapter,
    find_adapter_pairs,
    record_ranks,
    resize_adapter,
    unwrap,
)
from fwlora.budget import MatrixShape, adapter_cost, reallocate_ranks
from fwlora.checks import check_adapter, check_reallocation, choose_options
from fwlora.config import FwLoraConfig
from fwlora.estimators import (
    AdapterEstimator,
    ExactEstimator,
    GradientEstimator,
    PassEstimator,
    SketchEstimator,
    SketchProducts,
)
from fwlora.importance import FisherAccumulator, normalize_importance
from fwlora.options import FisherWeighting
from fwlora.reallocation import resize_factors
from fwlora.shrinkage import BatchedShrinkage, MakeShrinkage, Shrinkage, shrinkage_penalty
from fwlora.state import STATE_FORMAT, match_state

LOGGER = logging.getLogger(__name__)
# Live objects by first layer and adapter name: two on one adapter would add the term twice.
_HOLDERS: weakref.WeakKeyDictionary[nn.Module, dict[str, weakref.ref[FisherWeightedLora]]] = weakref.WeakKeyDictionary()


class UnmeasuredError(RuntimeError):
    """A warm-up without a finite gradient, from which no importances follow."""


class FisherWeightedLora:
    r"""Measure importances during the warm-up, then shrink the updates of unimportant matrices.

    .. math:: L = L_{task} + \lambda \sum_m (1 - I_m) \lVert \Delta W_m \rVert_F^2

    Usage: ``loss.backward(); fw.step(); optimizer.step()``. The first ``warmup_steps`` calls measure
    F_m <- beta F_m + (1 - beta) ||grad W_m||_F^2 (at every ``fisher_every``-th, with beta^n) and leave the gradients
    alone; the last of them freezes I_m = F_m / sum F. Every later call adds the shrinkage term's gradient to the
    adapters' gradients, which equals having added the term to the loss of that step.

    Where the term enters: call ``step`` once per optimizer step, after the last ``backward()`` of a gradient
    accumulation, after ``scaler.unscale_(optimizer)`` where there is a scaler, and before clipping, so that the whole
    gradient is clipped. ``forward`` is unchanged, so evaluation losses contain no penalty. No step but the one that
    freezes waits for the device.

    The measured gradients are those of the loss as it was back-propagated: micro-batches, repeated calls of a module
    and the processes of ``torch.distributed`` (where initialized; averaged, as data-parallel training does) are summed
    before the norm, so a loss that is averaged properly gives the value of the joint batch. Every backward pass since
    the previous ``step`` counts.

    Args:
        model: a PEFT model with LoRA adapters, also inside ``DistributedDataParallel`` or ``torch.compile``.
        options: None for those of the model's :class:`fwlora.FwLoraConfig`, or the defaults.
        adapter_name: of the adapter; None for the active one.

    Attributes:
        pairs: the adapted matrices, in model order; after a reallocation some may have rank 0.
        steps: calls of :meth:`step` so far.
        last_penalty: the term's value at the latest step, a scalar tensor on the device; 0 during the warm-up.
        make_shrinkage: makes what adds the term's gradient, when importances are frozen; a loop with kernels of its own
            sets another.
        sketch_products: makes the products of the estimator ``sketch``; likewise.

    Raises:
        ValueError: no such adapter, one that is frozen, held by another object or a variant of LoRA; an unsolved
            ``budget_percent``; options outside their range, or ``reallocate`` under several processes.
    """

    def __init__(
        self, model: nn.Module, options: FisherWeighting | None = None, *, adapter_name: str | None = None
    ) -> None:
        if isinstance(model, nn.DataParallel):
            raise ValueError(
                "`model` is an nn.DataParallel, whose replicas cannot be measured; use DistributedDataParallel"
            )
        adapter_name = find_active_adapter(model) if adapter_name is None else adapter_name
        self.pairs: list[AdapterPair] = find_adapter_pairs(model, adapter_name)
        config = adapter_config(model, adapter_name)
        check_adapter(self.pairs, config)
        self.options: FisherWeighting = choose_options(config, options)
        if self.options.allocation == "reallocate":
            check_reallocation(self.pairs, config)
        if options is None and not isinstance(config, FwLoraConfig) and any(bool(pair.B.any()) for pair in self.pairs):
            LOGGER.warning(
                "the adapter was trained before and its config has no options of FW-LoRA: continuing with the defaults;"
                " load it with config=FwLoraConfig.from_pretrained(folder), or give `options`"
            )
        self._closed = False
        self._model: weakref.ref[nn.Module] | None = weakref.ref(unwrap(model))
        self._initial_ranks = [pair.rank for pair in self.pairs]
        device, dtype = self.pairs[0].A.device, torch.promote_types(self.pairs[0].A.dtype, torch.float32)
        decay = self.options.decay**self.options.fisher_every
        self.fisher = FisherAccumulator(len(self.pairs), decay, device, dtype)
        self.steps = 0
        self.last_penalty: Tensor = torch.zeros((), device=device, dtype=dtype)
        self._importance: Tensor | None = None
        self._shrinkage: Shrinkage | None = None
        self.make_shrinkage: MakeShrinkage = BatchedShrinkage
        self._sketch_products = SketchProducts()
        self._hold(adapter_name)
        self._estimator: GradientEstimator | None = None
        self._place_hooks()

    @property
    def in_warmup(self) -> bool:
        """Whether the next :meth:`step` belongs to the warm-up."""
        return self._importance is None

    @property
    def sketch_products(self) -> SketchProducts:
        """What makes the products of the estimator ``sketch``."""
        return self._sketch_products

    @sketch_products.setter
    def sketch_products(self, products: SketchProducts) -> None:
        self._sketch_products = products
        if isinstance(self._estimator, SketchEstimator):
            self._estimator.products = products

    @property
    def pass_estimator(self) -> PassEstimator | None:
        """Return the estimator while this step is measured from what passes through modules.

        Forward paths that bypass module hooks call its ``observe``, with places in :attr:`pairs`.
        """
        return self._estimator if isinstance(self._estimator, PassEstimator) and self._estimator.measuring else None

    def step(self, optimizer: torch.optim.Optimizer | None = None, *, loss_scale: float | Tensor = 1.0) -> None:
        """Measure, or add the shrinkage gradient; call it once between ``backward()`` and ``optimizer.step()``.

        Args:
            optimizer: needed where ranks are reallocated: the state of a parameter whose shape changes is dropped, all
                other state is kept.
            loss_scale: factor of the loss in ``backward()``: with a ``GradScaler``, whose ``unscale_`` comes first, its
                ``get_scale()``. Measurements are divided by it; gradients are unscaled already.

        Raises:
            RuntimeError: called before any backward pass, or after :meth:`close`.
            UnmeasuredError: the warm-up ended and there is nothing to freeze, as every gradient was 0 or not finite; a
                caller that goes on measures further, and gets this error until a step can freeze.
            ValueError: ranks are to be reallocated and ``optimizer`` is missing or does not hold all adapters.
        """
        if self._closed:
            raise RuntimeError("`step` was called after close(); build a new FisherWeightedLora")
        if not self.in_warmup:
            self._require_gradients()
            self.shrink()
            return
        if self.options.allocation == "reallocate":
            self._check_optimizer(optimizer)
        if self._estimator is not None and self._estimator.measuring:
            self.fisher.update(self._estimator.take_squared_norms(loss_scale))
        else:
            self._require_gradients()
        self.steps += 1
        try:
            if self.steps >= self.options.warmup_steps:
                self._freeze(optimizer)
        finally:
            if self.in_warmup:
                self._start_measuring_when_due()

    @torch.no_grad()
    def shrink(self, loss_scale: float | Tensor = 1.0) -> None:
        """Add the shrinkage gradient, times ``loss_scale``, to the adapters' gradients, which may still be None.

        :meth:`step` does this after the warm-up. Loops that clip before ``step`` could be called, such as transformers'
        Trainer, call this instead, before the step's first ``backward()``.

        Raises:
            RuntimeError: still in the warm-up, or after :meth:`close`.
        """
        if self._closed:
            raise RuntimeError("`shrink` was called after close(); build a new FisherWeightedLora")
        if self.in_warmup:
            raise RuntimeError(f"`shrink` has no importances before step {self.options.warmup_steps}; call `step`")
        self.steps += 1
        if self._shrinkage is not None:
            self.last_penalty = self._shrinkage.add_gradients(loss_scale)

    def penalty(self) -> Tensor:
        """Return the differentiable term lambda sum_m (1 - I_m) ||dW_m||_F^2, a scalar; 0 during the warm-up."""
        if self._importance is None:
            return torch.zeros_like(self.last_penalty)
        factors = [pair.factors() for pair in self.pairs]
        scalings = [pair.scaling for pair in self.pairs]
        return shrinkage_penalty(factors, scalings, 1 - self._importance, self.options.strength)

    def importance(self) -> dict[str, float]:
        """Return the frozen I_m by module name.

        Raises:
            RuntimeError: still in the warm-up.
        """
        if self._importance is None:
            raise RuntimeError(f"importances are frozen after {self.options.warmup_steps} steps; {self.steps} are done")
        return self._by_name(self._importance)

    def norms(self) -> dict[str, float]:
        """Return ||dW_m||_F by module name."""
        return self._by_name(delta_norms(self.pairs))

    def skipped_steps(self) -> int:
        """Return the measured steps whose gradients were not finite and did not enter F; wait for the device."""
        return int(self.fisher.skipped)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs beside the states of model and optimizer; call it between two optimizer steps.

        It holds lists, numbers and names only, which JSON and ``torch.load(weights_only=True)`` keep exactly.
        """
        return {
            "format": STATE_FORMAT,
            "options": asdict(self.options),
            "names": [pair.name for pair in self.pairs],
            "shapes": [[pair.B.shape[0], pair.A.shape[1]] for pair in self.pairs],
            "initial_ranks": list(self._initial_ranks),
            "ranks": [pair.rank for pair in self.pairs],
            "steps": self.steps,
            "fisher": self.fisher.values.tolist(),
            "measured": int(self.fisher.measured),
            "skipped": int(self.fisher.skipped),
            "importance": None if self._importance is None else self._importance.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken, inside the warm-up or after it.

        For an exact resume after a reallocation, build model and optimizer with the initial ranks: this call changes
        them to the reallocated ones; load weights and the optimizer's state afterwards. A model that was built from a
        checkpoint with the reallocated ranks is accepted too. It lacks the matrices that lost their adapter, so the
        optimizer's state does not fit, and later states lack them.

        Raises:
            ValueError: see :func:`fwlora.state.match_state`.
            RuntimeError: called after :meth:`close`.
        """
        if self._closed:
            raise RuntimeError("`load_state_dict` was called after close(); build a new FisherWeightedLora")
        kept = match_state(state, self.options, self.pairs)
        restored = [state["ranks"][place] for place in kept]
        if restored != [pair.rank for pair in self.pairs]:
            for pair, rank in zip(self.pairs, restored, strict=True):
                resize_adapter(pair, pair.A.new_zeros(rank, pair.A.shape[1]), pair.B.new_zeros(pair.B.shape[0], rank))
            self._record_ranks()
        self._initial_ranks = [state["initial_ranks"][place] for place in kept]
        self.steps = state["steps"]
        fisher = self.fisher
        fisher.values = fisher.values.new_tensor([state["fisher"][place] for place in kept])
        fisher.measured.fill_(state["measured"])
        fisher.skipped.fill_(state["skipped"])
        self._remove_hooks()
        if state["importance"] is not None:
            importance = fisher.values.new_tensor([state["importance"][place] for place in kept])
            self._start_shrinking(importance)
            return
        self._importance = self._shrinkage = None
        self._place_hooks()

    def close(self) -> None:
        """Remove every hook; another object may then be attached to the model."""
        self._remove_hooks()
        self._closed = True
        _HOLDERS.get(self.pairs[0].module, {}).pop(self.pairs[0].adapter_name, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> FisherWeightedLora:
        """Return an object that measures the copy of the model; ``copy.deepcopy((model, fw))`` returns both."""
        held = None if self._model is None else self._model()
        model = None if held is None else copy.deepcopy(held, memo)
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin._model = None if model is None else weakref.ref(model)
        twin.pairs = [copy.deepcopy(pair, memo) for pair in self.pairs]
        for name in ("options", "fisher", "last_penalty", "_initial_ranks", "_importance"):
            setattr(twin, name, copy.deepcopy(getattr(self, name), memo))
        if self._closed:
            return twin
        twin._hold(self.pairs[0].adapter_name)
        twin._estimator = None
        if twin._importance is None:
            twin._place_hooks()
        else:
            twin._start_shrinking(twin._importance)
        return twin

    def _hold(self, adapter_name: str) -> None:
        holders = _HOLDERS.setdefault(self.pairs[0].module, {})
        held = holders.get(adapter_name)
        if held is not None and held() is not None:
            raise ValueError(
                f"adapter {adapter_name!r} of `model` already has a FisherWeightedLora, and a second would add its "
                "gradient again; use that one, or call its close() first"
            )
        holders[adapter_name] = weakref.ref(self)

    def _place_hooks(self) -> None:
        self._estimator = self._make_estimator()
        # Hooks of an object that is garbage-collected without close() are removed.
        self._finalizer = weakref.finalize(self, GradientEstimator.close, self._estimator)
        self._start_measuring_when_due()

    def _remove_hooks(self) -> None:
        if self._estimator is not None:
            self._finalizer()
        self._estimator = None

    def _start_measuring_when_due(self) -> None:
        if self._estimator is not None and self.steps % self.options.fisher_every == 0:
            self._estimator.start(self.steps + 1)

    def _make_estimator(self) -> GradientEstimator:
        if self.options.estimator == "exact":
            return ExactEstimator(self.pairs)
        if self.options.estimator == "adapter":
            return AdapterEstimator(self.pairs)
        return SketchEstimator(self.pairs, self.options.sketch_size, self.options.seed, self._sketch_products)

    def _check_optimizer(self, optimizer: torch.optim.Optimizer | None) -> None:
        if optimizer is None:
            raise ValueError("`optimizer` is missing: with allocation='reallocate' call step(optimizer)")
        groups = getattr(optimizer, "param_groups", [])
        held = {id(parameter) for group in groups for parameter in group["params"]}
        missing = [pair.name for pair in self.pairs if not {id(pair.A), id(pair.B)} <= held]
        if missing:
            raise ValueError(
                f"`optimizer` ({type(optimizer).__name__}) does not hold both factors of {len(missing)} matrices, the "
                f"first {missing[0]!r}; with allocation='reallocate' one optimizer has to hold all adapters"
            )

    def _require_gradients(self) -> None:
        if all(pair.A.grad is None and pair.B.grad is None for pair in self.pairs):
            raise RuntimeError(
                "`step` was called before any backward pass: no adapter has a gradient; call it once between "
                f"loss.backward() and optimizer.step(), with adapter {self.pairs[0].adapter_name!r} active"
            )

    def _freeze(self, optimizer: torch.optim.Optimizer | None) -> None:
        if not int(self.fisher.measured):
            raise UnmeasuredError(
                f"none of {int(self.fisher.skipped)} measured steps had finite gradients; lower the learning rate, or "
                "look for the cause with torch.autograd.set_detect_anomaly(True)"
            )
        try:
            importance = normalize_importance(self.fisher.values, self.options.importance)
            if self.options.allocation == "reallocate":
                assert optimizer is not None
                self._reallocate(optimizer)
        except ValueError as error:
            raise UnmeasuredError(f"importances cannot be frozen at step {self.steps}: {error}") from None
        self._remove_hooks()
        self._start_shrinking(importance)

    def _reallocate(self, optimizer: torch.optim.Optimizer) -> None:
        matrices = [MatrixShape(pair.name, pair.A.shape[1], pair.B.shape[0]) for pair in self.pairs]
        former = {pair.name: pair.rank for pair in self.pairs}
        caps = {
            pair.name: min(math.ceil(self.options.max_rank_factor * pair.rank - 1e-9), pair.A.shape[1], pair.B.shape[0])
            for pair in self.pairs
        }
        # F and not I: uniform shrinkage has no importances, but its ranks can still follow the measurement.
        shares = self._by_name(self.fisher.values)
        ranks = reallocate_ranks(matrices, shares, adapter_cost(matrices, former), caps)
        generator = torch.Generator().manual_seed(self.options.seed)
        for pair in self.pairs:
            if ranks[pair.name] == pair.rank:
                continue
            resize_adapter(pair, *resize_factors(pair.A, pair.B, ranks[pair.name], generator))
            for parameter in (pair.A, pair.B):
                optimizer.state.pop(parameter, None)
        self._record_ranks()

    def _record_ranks(self) -> None:
        model = None if self._model is None else self._model()
        if model is not None:
            record_ranks(model, self.pairs)

    def _start_shrinking(self, importance: Tensor) -> None:
        self._importance = importance
        self._shrinkage = None
        chosen = [index for index, pair in enumerate(self.pairs) if pair.rank > 0]
        if self.options.strength > 0 and chosen:
            scalings = importance.new_tensor([self.pairs[index].scaling for index in chosen])
            coefficients = self.options.strength * (1 - importance[chosen]) * scalings.square()
            self._shrinkage = self.make_shrinkage([(self.pairs[i].A, self.pairs[i].B) for i in chosen], coefficients)

    def _by_name(self, values: Tensor) -> dict[str, float]:
        return dict(zip([pair.name for pair in self.pairs], values.tolist(), strict=True))
