"""Callbacks that run FW-LoRA and AdaLoRA inside ``transformers.Trainer``.

``Trainer(..., callbacks=[FwLoraCallback()])`` for a model from ``get_peft_model(base, FwLoraConfig(...))``,
``Trainer(..., callbacks=[AdaLoraCallback()])`` for one with an ``AdaLoraConfig``.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from peft.tuners.adalora import AdaLoraModel
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from fwlora.adalora import keep_orthogonal_term_out_of_evaluation
from fwlora.adapters import unwrap
from fwlora.options import FisherWeighting
from fwlora.regularizer import FisherWeightedLora


class FwLoraCallback(TrainerCallback, ExportableState):
    """Run Fisher-weighted LoRA in a Trainer: measure during the warm-up, then add the shrinkage gradient.

    The Trainer clips before ``on_pre_optimizer_step``. The shrinkage gradient is therefore written when a step begins,
    before its first ``backward()`` adds to it, so that the whole gradient is clipped; measurements are made in the
    backward pass, of unclipped gradients. With fp16 both follow the loss scale. Evaluation losses contain no penalty.

    The state travels in the checkpoint's ``trainer_state.json``, and ``trainer.train(resume_from_checkpoint=...)``
    continues exactly, inside the warm-up or after it, but not after a reallocation: the Trainer loads weights before it
    calls callbacks, so it cannot load a checkpoint whose ranks are not the model's. A loop of your own can, see
    :meth:`fwlora.FisherWeightedLora.load_state_dict`.

    Args:
        options: None for those of the model's :class:`fwlora.FwLoraConfig`, or the defaults.
        adapter_name: of the adapter; None for the active one.

    Attributes:
        fisher_weighted: made when training starts; it has the importances.
    """

    def __init__(
        self, options: FisherWeighting | dict[str, Any] | None = None, adapter_name: str | None = None
    ) -> None:
        # A Trainer that restores callbacks makes them from exported arguments, which are JSON.
        self.options = FisherWeighting(**options) if isinstance(options, dict) else options
        self.adapter_name = adapter_name
        self.fisher_weighted: FisherWeightedLora | None = None
        self.exported: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps; the Trainer calls it when it saves."""
        held = self.fisher_weighted
        options = None if self.options is None else asdict(self.options)
        return {
            "args": {"options": options, "adapter_name": self.adapter_name},
            "attributes": {"exported": None if held is None else held.state_dict()},
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the model, anew for every ``train()``; continue from the checkpoint where there is one.

        Raises:
            ValueError: see :class:`fwlora.FisherWeightedLora`; a warm-up as long as the training; a checkpoint without
                this callback's state; several GPUs in one process; checkpoints that a signal asks for.
        """
        if args.n_gpu > 1:
            raise ValueError(
                f"the Trainer spreads one process over {args.n_gpu} GPUs (nn.DataParallel), whose replicas cannot be "
                "measured; start it with torchrun or accelerate launch, or show it one GPU by CUDA_VISIBLE_DEVICES=0"
            )
        if getattr(args, "enable_jit_checkpoint", False):
            raise ValueError(
                "`enable_jit_checkpoint` is True, but a signal may have such a checkpoint written between the "
                "measurement of a step and the optimizer's step, and a resume would measure it twice; set "
                "enable_jit_checkpoint=False and save by save_steps"
            )
        if self.fisher_weighted is not None:
            self.fisher_weighted.close()
        self.fisher_weighted = FisherWeightedLora(kwargs["model"], self.options, adapter_name=self.adapter_name)
        options = self.fisher_weighted.options
        if state.max_steps < 2:
            raise ValueError(
                f"the Trainer takes {state.max_steps} optimizer steps, and FW-LoRA needs one to measure and one to "
                "shrink; raise max_steps or num_train_epochs"
            )
        if options.warmup_steps >= state.max_steps:
            raise ValueError(
                f"`warmup_steps` is {options.warmup_steps}, but the Trainer takes {state.max_steps} optimizer steps: "
                f"importances would never be used and FW-LoRA would be LoRA; set it below {state.max_steps}"
            )
        if options.allocation == "reallocate" and args.load_best_model_at_end:
            raise ValueError(
                "`load_best_model_at_end` is True, but with allocation='reallocate' a best checkpoint of the warm-up "
                "has other ranks than the model at the end; set load_best_model_at_end=False"
            )
        if state.global_step == 0:
            return
        callbacks: Any = state.stateful_callbacks
        stored = callbacks.get(type(self).__name__) if isinstance(callbacks, dict) else None
        exported = stored["attributes"]["exported"] if isinstance(stored, dict) else None
        if exported is None:
            raise ValueError(
                f"training resumes at step {state.global_step}, but the checkpoint was made without FwLoraCallback: "
                "what it measured is unknown; start anew, or continue without the callback"
            )
        self.fisher_weighted.load_state_dict(exported)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the shrinkage gradient, after the warm-up; the step's backward passes add to it."""
        held = self.fisher_weighted
        if held is not None and not held.in_warmup:
            held.shrink(_loss_scale(kwargs["optimizer"]))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure, during the warm-up."""
        held = self.fisher_weighted
        if held is not None and held.in_warmup:
            held.step(kwargs["optimizer"], loss_scale=_loss_scale(kwargs["optimizer"]))


class AdaLoraCallback(TrainerCallback):
    """Run AdaLoRA in a Trainer, which does not call ``update_and_allocate``: after every optimizer step, from 1.

    PEFT adds the orthogonality term to the loss in evaluation too; with this callback in training alone.
    """

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the orthogonality term out of evaluation losses, also before and after training.

        Raises:
            ValueError: the model has no AdaLoRA adapter.
        """
        keep_orthogonal_term_out_of_evaluation(_find_adalora(kwargs["model"]))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the schedule fits the training; handle models that ``model_init`` made.

        Raises:
            ValueError: the schedule is longer than the training, so the budget would never be reached; a resume,
                ``load_best_model_at_end`` or ``enable_jit_checkpoint``, which need adapters that the Trainer cannot
                load.
        """
        tuner = _find_adalora(kwargs["model"])
        keep_orthogonal_term_out_of_evaluation(tuner)
        wanted = [name for name in ("load_best_model_at_end", "enable_jit_checkpoint") if getattr(args, name, False)]
        if wanted or state.global_step > 0:
            what, remedy = ("training resumes", "train in one go")
            if wanted:
                what, remedy = (f"`{wanted[0]}` is True", f"set {wanted[0]}=False")
            raise ValueError(
                f"{what}, but a saved AdaLoRA adapter holds the triplets in use alone, and the Trainer cannot load it "
                f"into the model, whose adapters have their initial rank; {remedy}"
            )
        config: Any = tuner.peft_config[tuner.trainable_adapter_name]
        total_step = config.total_step
        if total_step > state.max_steps:
            raise ValueError(
                f"`AdaLoraConfig.total_step` is {total_step}, but the Trainer takes {state.max_steps} optimizer steps: "
                f"the budget would never be reached; set total_step={state.max_steps}"
            )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update scores and masks, while the step's gradients are still there."""
        _find_adalora(kwargs["model"]).update_and_allocate(state.global_step + 1)


def _find_adalora(model: Any) -> AdaLoraModel:
    tuner = getattr(unwrap(model), "base_model", None)
    if not isinstance(tuner, AdaLoraModel):
        raise ValueError(
            f"`model` ({type(model).__name__}) has no AdaLoRA adapter; wrap it with get_peft_model and AdaLoraConfig"
        )
    return tuner


def _loss_scale(optimizer: Any) -> float:
    """Return the factor of the loss in fp16 training; 1 without it."""
    scaler = getattr(optimizer, "scaler", None)
    return scaler.get_scale() if scaler is not None else 1.0
