"""The callbacks inside transformers' Trainer: against a plain loop, across checkpoints, and what AdaLoRA lacks."""

from __future__ import annotations

import copy
import signal
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel
from torch import nn

from fwlora import AdaLoraCallback, FisherWeightedLora, FisherWeighting, FwLoraCallback
from fwlora.adapters import find_adapter_pairs
from tests.helpers.trainer_models import (
    STEPS,
    Sentences,
    adapters_of,
    make_base,
    make_model,
    make_trainer,
    wrap,
)

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")


def plain_loop(model, folder: Path, accumulation: int = 1) -> FisherWeightedLora:
    """The Trainer's arithmetic by hand: fw.step() between backward() and clipping."""
    trainer = make_trainer(copy.deepcopy(model), folder, [], gradient_accumulation_steps=accumulation)
    batches = list(trainer.get_train_dataloader())
    fw = FisherWeightedLora(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    model.train()
    for start in range(0, len(batches), accumulation):
        group = batches[start : start + accumulation]
        for batch in group:
            (model(**batch).loss / len(group)).backward()
        fw.step()
        nn.utils.clip_grad_norm_(parameters, 0.05)
        optimizer.step()
        optimizer.zero_grad()
    return fw


@pytest.mark.parametrize("estimator", ["exact", "sketch", "adapter"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_trainer_does_what_a_plain_loop_does(estimator, accumulation, tmp_path):
    options = {"estimator": estimator, "warmup_steps": 4 if accumulation == 1 else 2, "fisher_every": 1}
    by_hand = make_model(**options)
    callback = FwLoraCallback()
    trained = make_model(**options)
    # SGD: Adam would make whole steps of the rounding of gradients near zero.
    arguments = {"gradient_accumulation_steps": accumulation, "optim": "sgd", "learning_rate": 0.5}
    make_trainer(trained, tmp_path, [callback], **arguments).train()
    fw = plain_loop(by_hand, tmp_path, accumulation)
    assert callback.fisher_weighted.steps == fw.steps == STEPS // accumulation
    torch.testing.assert_close(
        list(callback.fisher_weighted.importance().values()), list(fw.importance().values()), rtol=1e-4, atol=1e-7
    )
    torch.testing.assert_close(adapters_of(trained), adapters_of(by_hand), rtol=1e-5, atol=1e-7)
    # The term is large enough to matter: without it the result is another.
    plain = make_model(**options)
    make_trainer(plain, tmp_path, [], **arguments).train()
    assert not torch.allclose(adapters_of(plain)[1], adapters_of(trained)[1], rtol=1e-2, atol=1e-5)


def test_zero_strength_in_the_trainer_is_lora_bit_for_bit(tmp_path):
    plain, weighted = make_model(), make_model(strength=0.0)
    make_trainer(plain, tmp_path, []).train()
    make_trainer(weighted, tmp_path, [FwLoraCallback()]).train()
    for p, q in zip(plain.parameters(), weighted.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("stop", [3, 4, 7])
def test_resume_from_checkpoint_is_exact(stop, tmp_path):
    through = make_model()
    whole = FwLoraCallback()
    make_trainer(through, tmp_path / "a", [whole]).train()
    first = make_model()
    make_trainer(
        first, tmp_path / "b", [FwLoraCallback()], save_strategy="steps", save_steps=stop, save_total_limit=None
    ).train()
    checkpoint = tmp_path / "b" / f"checkpoint-{stop}"
    assert {"adapter_config.json", "fwlora_config.json", "trainer_state.json"} <= {p.name for p in checkpoint.iterdir()}
    for restore in (False, True):
        resumed, callback = make_model(), FwLoraCallback()
        trainer = make_trainer(
            resumed, tmp_path / "b", [callback], save_strategy="no", restore_callback_states_from_checkpoint=restore
        )
        trainer.train(resume_from_checkpoint=str(checkpoint))
        held = next(c for c in trainer.callback_handler.callbacks if isinstance(c, FwLoraCallback)).fisher_weighted
        assert held.importance() == whole.fisher_weighted.importance()
        for p, q in zip(through.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(p, q)


def test_a_checkpoint_made_without_the_callback_is_refused(tmp_path):
    make_trainer(make_model(), tmp_path, [], save_strategy="steps", save_steps=5).train()
    trainer = make_trainer(make_model(), tmp_path, [FwLoraCallback()])
    with pytest.raises(ValueError, match="resumes at step 5, but the checkpoint was made without FwLoraCallback"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_checkpoints_that_a_signal_asks_for_are_refused_before_a_step(tmp_path):
    # transformers saves them before the optimizer's step as well, when the step is measured already.
    trainer = make_trainer(make_model(), tmp_path, [FwLoraCallback()], enable_jit_checkpoint=True)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(
            ValueError, match=r"`enable_jit_checkpoint` is True, but a signal may .* save by save_steps"
        ):
            trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)


class ScaledOptimizer:
    """What Accelerate hands to callbacks under fp16: an optimizer with its gradient scaler."""

    class scaler:
        get_scale = staticmethod(lambda: 64.0)


def test_under_fp16_both_phases_follow_the_loss_scale(tmp_path):
    found = []
    for optimizer, scale in ((None, 1.0), (ScaledOptimizer(), 64.0)):
        model, callback = make_model(warmup_steps=1, fisher_every=1), FwLoraCallback()
        trainer = make_trainer(model, tmp_path, [])
        trainer.state.max_steps = STEPS
        given = (trainer.args, trainer.state, trainer.control)
        callback.on_train_begin(*given, model=model)
        batch = {k: torch.stack([torch.as_tensor(row[k]) for row in Sentences(4)]) for k in ("input_ids", "labels")}
        (scale * model(**batch).loss).backward()
        callback.on_pre_optimizer_step(*given, optimizer=optimizer)
        model.zero_grad()
        callback.on_step_begin(*given, optimizer=optimizer)
        held = callback.fisher_weighted
        found.append((held.fisher.values, held.last_penalty, [pair.B.grad / scale for pair in held.pairs]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-9)


def test_trainings_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ValueError, match=f"`warmup_steps` is {STEPS}, but the Trainer takes {STEPS} optimizer steps"):
        make_trainer(make_model(warmup_steps=STEPS), tmp_path, [FwLoraCallback()]).train()
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 3}
    with pytest.raises(ValueError, match="`load_best_model_at_end` is True, but with allocation='reallocate'"):
        make_trainer(make_model(allocation="reallocate"), tmp_path, [FwLoraCallback()], save_steps=3, **best).train()


def test_options_beside_the_model_and_a_second_training(tmp_path):
    model = wrap(make_base(), LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    callback = FwLoraCallback(FisherWeighting(warmup_steps=2, fisher_every=1), adapter_name="default")
    trainer = make_trainer(model, tmp_path, [callback])
    trainer.train()
    first = callback.fisher_weighted
    trainer.train()
    assert callback.fisher_weighted is not first and callback.fisher_weighted.steps == STEPS
    again = FwLoraCallback(**callback.state()["args"])
    assert again.options == callback.options and again.adapter_name == "default"


def test_evaluation_loss_is_the_tasks_alone(tmp_path):
    model = make_model(strength=1e6)
    trainer = make_trainer(model, tmp_path, [FwLoraCallback()], learning_rate=1e-4)
    trainer.train()
    batch = {k: torch.stack([torch.as_tensor(row[k]) for row in Sentences(12)]) for k in ("input_ids", "labels")}
    with torch.no_grad():
        logits = model.eval()(input_ids=batch["input_ids"]).logits
    expected = float(nn.functional.cross_entropy(logits, batch["labels"]))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_reallocation_in_the_trainer(tmp_path):
    model = make_model(allocation="reallocate", warmup_steps=3)
    callback = FwLoraCallback()
    trainer = make_trainer(model, tmp_path, [callback])
    trainer.train()
    ranks = [pair.rank for pair in callback.fisher_weighted.pairs]
    assert ranks != [2] * len(ranks)
    model.save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        loaded = PeftModel.from_pretrained(make_base(), tmp_path / "adapter")
    tokens = Sentences(5).tokens
    assert torch.equal(loaded.eval()(input_ids=tokens).logits, model.eval()(input_ids=tokens).logits)


def adalora_model(total_step: int = STEPS) -> nn.Module:
    config = AdaLoraConfig(
        init_r=3, target_r=1, lora_alpha=6, target_modules=["query", "value"], task_type="SEQ_CLS", tinit=1, tfinal=2,
        total_step=total_step,
    )  # fmt: skip
    return wrap(make_base(), config)


def test_adalora_allocates_each_step_and_reaches_its_budget(tmp_path):
    model = adalora_model()
    calls = []
    allocate = model.base_model.update_and_allocate

    def noted(step):
        gradients = [pair.A.grad is not None for pair in find_adapter_pairs(model)]
        calls.append((step, all(gradients)))
        allocate(step)

    model.base_model.update_and_allocate = noted
    make_trainer(model, tmp_path, [AdaLoraCallback()], max_grad_norm=0).train()
    assert calls == [(step, True) for step in range(1, STEPS + 1)]
    kept = sum(sum(mask) for mask in model.peft_config["default"].rank_pattern.values())
    assert kept == 1 * 4


def test_without_the_callback_adalora_never_allocates(tmp_path):
    model = adalora_model()
    make_trainer(model, tmp_path, []).train()
    assert not model.peft_config["default"].rank_pattern


def test_adaloras_orthogonal_term_trains_and_is_not_evaluated(tmp_path):
    model = adalora_model()
    batch = {k: torch.stack([torch.as_tensor(row[k]) for row in Sentences(12)]) for k in ("input_ids", "labels")}
    contaminated = float(model.eval()(**batch).loss.detach())
    trainer = make_trainer(model, tmp_path, [AdaLoraCallback()])
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"]).logits
    cross_entropy = float(nn.functional.cross_entropy(logits, batch["labels"]))
    assert contaminated > cross_entropy + 0.1
    assert trainer.evaluate()["eval_loss"] == pytest.approx(cross_entropy, rel=1e-5)
    assert float(model.train()(**batch).loss.detach()) == pytest.approx(contaminated, rel=1e-5)


def test_adaloras_evaluation_is_clean_for_models_made_late_and_for_copies(tmp_path):
    batch = {k: torch.stack([torch.as_tensor(row[k]) for row in Sentences(12)]) for k in ("input_ids", "labels")}
    model = adalora_model()
    trainer = make_trainer(model, tmp_path, [])
    trainer.add_callback(AdaLoraCallback())
    trainer.train()
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        logits = twin(input_ids=batch["input_ids"]).logits
        assert float(twin(**batch).loss) == pytest.approx(
            float(nn.functional.cross_entropy(logits, batch["labels"])), rel=1e-5
        )
        for parameter in twin.parameters():
            parameter.zero_()
        assert float(twin(**batch).logits.abs().max()) == 0.0


def test_adaloras_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"`model` \(PeftModelForSequenceClassification\) has no AdaLoRA adapter"):
        make_trainer(make_model(), tmp_path, [AdaLoraCallback()])
    trainer = make_trainer(adalora_model(total_step=50), tmp_path, [AdaLoraCallback()])
    with pytest.raises(ValueError, match=f"total_step` is 50, but the Trainer takes {STEPS} .* set total_step={STEPS}"):
        trainer.train()


@pytest.mark.parametrize("argument", ["load_best_model_at_end", "enable_jit_checkpoint", "resume"])
def test_adalora_checkpoints_that_the_trainer_cannot_load_are_refused_before_a_step(argument):
    model = wrap(make_base(), AdaLoraConfig(target_modules=["query"], total_step=10, task_type="SEQ_CLS"))
    arguments = SimpleNamespace(**{argument: True})
    state = SimpleNamespace(global_step=4 if argument == "resume" else 0, max_steps=20)
    with pytest.raises(ValueError, match=r"but a saved AdaLoRA adapter holds the triplets in use alone"):
        AdaLoraCallback().on_train_begin(arguments, state, None, model=model)
