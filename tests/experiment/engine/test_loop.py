from __future__ import annotations

import platform
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from transformers.optimization import get_scheduler

from fwlora.experiment.data.batching import TokenizedSplit
from fwlora.experiment.engine.device import UnavailableDeviceError, choose_device, keep_freed_memory
from fwlora.experiment.engine.loop import evaluate, train
from fwlora.experiment.engine.meters import STEPS_PER_FLUSH, DivergedError
from fwlora.experiment.engine.optimizer import ScheduleError
from fwlora.experiment.engine.options import TrainingOptions
from fwlora.experiment.engine.task import Task
from fwlora.experiment.fused.forward import PlainClassifier
from fwlora.experiment.methods.lora import LoraMethod
from fwlora.experiment.tracking import metrics
from tests.helpers.engine_options import CPU, pad_literally

TASK = Task(pad_token_id=0, num_classes=2, task_metric="accuracy")


class BagOfWords(nn.Module):
    """Mean embedding of the unmasked tokens, then a linear layer: padding must not matter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 8)
        self.classifier = nn.Linear(8, 2)
        self.seen: list[int] = []
        self.widths: list[int] = []

    def forward(self, input_ids, attention_mask):
        if self.training:
            self.seen += input_ids[:, 0].tolist()
        self.widths.append(input_ids.shape[1])
        mask = attention_mask[..., None].float()
        pooled = (self.embedding(input_ids) * mask).sum(1) / mask.sum(1)
        return type("Output", (), {"logits": self.classifier(pooled)})()


class Watcher(LoraMethod):
    """Records the order in which the engine calls a method."""

    def __init__(self, penalty: float = 0.0, model: nn.Module | None = None) -> None:
        super().__init__([])
        self.calls: list[str] = []
        self.penalty, self.model = penalty, model

    def loss_term(self):
        self.calls.append("loss_term")
        return self.penalty * self.model.classifier.weight.square().sum() if self.model is not None else None

    def after_backward(self, optimizer):
        self.calls.append("after_backward")

    def after_step(self, step):
        self.calls.append(f"after_step {step}")


def make_split(count: int = 41, seed: int = 0) -> TokenizedSplit:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, 9, size=count)
    tokens = generator.integers(1, 50, size=lengths.sum()).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens[offsets[:-1]] = np.arange(count) % 49 + 1
    return TokenizedSplit(tokens, None, offsets, (tokens[offsets[:-1]] % 2).astype(np.int64))


def make_options(**options) -> TrainingOptions:
    defaults = {"epochs": 2, "batch_size": 8, "learning_rate": 0.05, "warmup_ratio": 0.1, "seed": 3}
    return TrainingOptions(**{**defaults, **options})


def run(options=None, engine=CPU, method=None, split=None, model=None):
    model = model or BagOfWords()
    rows: list[dict] = []
    split = split or make_split()
    result = train(
        model, method or LoraMethod([]), split, make_split(30, 1), make_options(**(options or {})), TASK, engine,
        log=lambda row: rows.append(dict(row)),
    )  # fmt: skip
    return model, rows, result


def test_every_step_and_every_epoch_is_logged_under_its_names():
    _, rows, result = run()
    steps = [row for row in rows if metrics.TRAIN_LOSS in row]
    epochs = [row for row in rows if metrics.EVAL_LOSS in row]
    assert [row[metrics.GLOBAL_STEP] for row in steps] == list(range(1, 13)) and result.total_steps == 12
    assert [row[metrics.EPOCH] for row in epochs] == [1, 2] and [row[metrics.GLOBAL_STEP] for row in epochs] == [6, 12]
    names = {"train_loss", "gradient_norm", "penalty", "learning_rate", "fisher_warmup", "global_step", "epoch"}
    assert set(steps[0]) == names
    assert {"eval_accuracy", "eval_matthews_correlation", "eval_f1", "train_epoch_loss"} <= set(epochs[0])
    assert steps[-1][metrics.EPOCH] == 2.0 and steps[2][metrics.EPOCH] == 0.5
    assert [row["learning_rate"] for row in steps[:3]] == [0.0, 0.025, 0.05]
    assert result.epochs == epochs and len(result.step_times_s) == 12
    assert all(isinstance(value, (int, float)) for row in rows for value in row.values())


def test_epoch_loss_is_the_mean_over_examples_not_batches():
    _, rows, _ = run({"epochs": 1})
    sizes = [8] * 6
    losses = [row["train_loss"] for row in rows if "train_loss" in row]
    # 41 examples: one of the six batches holds a single one, and its place is random.
    candidates = []
    for place in range(6):
        sizes = [8] * 6
        sizes[place] = 1
        candidates.append(np.average(losses, weights=sizes))
    assert any(abs(rows[-1]["train_epoch_loss"] - value) < 1e-6 for value in candidates)


def test_training_sees_every_example_once_per_epoch():
    model, _, _ = run({"epochs": 3})
    split = make_split()
    assert sorted(model.seen) == sorted(split.tokens[split.offsets[:-1]].tolist() * 3)


def test_it_learns():
    _, _, result = run({"epochs": 30})
    assert result.last.values["eval_accuracy"] >= 0.9


def test_equal_seeds_give_equal_runs_and_another_seed_does_not():
    (_, first, _), (_, again, _), (_, other, _) = run(), run(), run({"seed": 4})
    assert first == again and first != other


def test_accumulated_micro_batches_equal_the_joint_batch():
    split = make_split(40)
    equal = TokenizedSplit(split.tokens, None, split.offsets, split.labels)
    joint_model, joint_rows, _ = run({"batch_size": 40, "epochs": 4}, split=equal)
    model, rows, result = run({"batch_size": 9, "gradient_accumulation_steps": 5, "epochs": 4}, split=equal)
    assert result.total_steps == 4
    for got, expected in zip(rows, joint_rows, strict=True):
        assert got["train_loss" if "train_loss" in got else "eval_loss"] == pytest.approx(
            expected["train_loss" if "train_loss" in got else "eval_loss"], rel=1e-5
        )
    for p, q in zip(model.parameters(), joint_model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_literal_padding_is_to_the_width_in_random_order_with_the_same_model():
    model, _, _ = run(engine=pad_literally(16))
    assert set(model.widths) == {16}
    fast, _, _ = run()
    assert max(fast.widths) <= 8
    evaluation = [
        evaluate(PlainClassifier(fast), make_split(30, 1), 8, TASK, engine).loss for engine in (CPU, pad_literally(16))
    ]
    assert evaluation[0] == pytest.approx(evaluation[1], rel=1e-6)


def test_evaluation_counts_each_example_once_in_data_set_order():
    model, split = BagOfWords(), make_split(37, 2)
    result = evaluate(PlainClassifier(model), split, 5, TASK, CPU)
    losses, predictions = [], []
    for i in range(37):
        tokens = torch.from_numpy(split.tokens[split.offsets[i] : split.offsets[i + 1]].astype(np.int64))[None]
        logits = model(tokens, torch.ones_like(tokens)).logits
        losses.append(nn.functional.cross_entropy(logits, torch.tensor([split.labels[i]])).item())
        predictions.append(int(logits.argmax()))
    assert result.predictions.tolist() == predictions
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-6)
    assert result.values["eval_accuracy"] == np.mean(np.array(predictions) == split.labels)


def test_method_is_called_in_order_once_per_optimizer_step():
    method = Watcher()
    run({"epochs": 1, "gradient_accumulation_steps": 2}, method=method)
    expected = [call for step in (1, 2, 3) for call in ("loss_term", "after_backward", f"after_step {step}")]
    assert method.calls == expected


def test_a_methods_term_trains_but_never_enters_a_logged_loss():
    model = BagOfWords()
    _, rows, result = run({"epochs": 1}, method=Watcher(1e4, model), model=model)
    plain, plain_rows, _ = run({"epochs": 1})
    assert rows[0]["train_loss"] == plain_rows[0]["train_loss"]
    assert model.classifier.weight.norm() < plain.classifier.weight.norm()
    assert result.last.loss < 1.5


class GradientSetter(LoraMethod):
    """Replaces every gradient, and notes the weights that it sees after the step."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__([])
        self.model, self.before, self.after = model, [], []

    def after_backward(self, optimizer):
        for parameter in self.model.parameters():
            parameter.grad = torch.full_like(parameter, 2.0)
        self.before.append(self.model.classifier.weight.detach().clone())

    def after_step(self, step):
        self.after.append(self.model.classifier.weight.detach().clone())


def test_what_a_method_adds_is_in_the_logged_norm_and_its_last_word_comes_after_the_optimizer():
    model = BagOfWords()
    method = GradientSetter(model)
    _, rows, _ = run({"epochs": 1, "warmup_ratio": 0.0}, method=method, model=model)
    count = sum(p.numel() for p in model.parameters())
    assert rows[0]["gradient_norm"] == pytest.approx(2.0 * count**0.5)
    assert not torch.equal(method.before[0], method.after[0])
    assert torch.equal(method.after[-1], model.classifier.weight)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear", {}), ("cosine", {"num_cycles": 0.4}), ("cosine_with_restarts", {"num_cycles": 2}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}), ("cosine_warmup_with_min_lr", {"min_lr": 0.01}),
        ("polynomial", {"power": 2.0}), ("constant", {}), ("constant_with_warmup", {}), ("inverse_sqrt", {}),
        ("warmup_stable_decay", {"num_decay_steps": 3}),
    ],
)  # fmt: skip
def test_schedules_are_those_that_transformers_names(name, options):
    _, rows, _ = run({"lr_scheduler": name, "lr_scheduler_options": options})
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.05)
    schedule, expected = get_scheduler(name, optimizer, 2, 12, options), []
    for _ in range(12):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert [row["learning_rate"] for row in rows if "learning_rate" in row] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"lr_scheduler": "polynomial", "learning_rate": 1e-9}, "lr_end"),
        ({"lr_scheduler": "cosine", "lr_scheduler_options": {"color": 1}}, "color"),
    ],
)
def test_a_schedule_that_cannot_be_is_one_message(options, reason):
    with pytest.raises(ScheduleError, match=reason) as raised:
        run(options)
    assert raised.value.name == options["lr_scheduler"] and reason in raised.value.reason


class Noisy(BagOfWords):
    def forward(self, input_ids, attention_mask):
        self.drawn = getattr(self, "drawn", []) + ([torch.rand(()).item()] if self.training else [])
        return super().forward(input_ids, attention_mask)


def test_the_dropout_stream_is_the_seeds_whatever_was_drawn_before():
    streams = []
    for draws in (0, 5):
        model = Noisy()
        torch.rand(draws)
        run({"epochs": 1}, model=model)
        streams.append(model.drawn)
    assert streams[0] == streams[1] and len(streams[0]) == 6


def test_clipping_bounds_the_update_and_logs_the_norm_before_it():
    _, free, _ = run({"epochs": 1})
    _, clipped, _ = run({"epochs": 1, "max_gradient_norm": 1e-12})
    assert clipped[0]["gradient_norm"] == free[0]["gradient_norm"] > 1e-3
    assert clipped[-2]["train_loss"] != free[-2]["train_loss"]


def test_a_loss_that_is_not_finite_stops_with_its_step():
    model = BagOfWords()
    model.classifier.weight.data[0, 0] = float("nan")
    with pytest.raises(DivergedError, match="the training loss is nan at step 1") as raised:
        run(model=model)
    assert np.isnan(raised.value.loss) and raised.value.step == 1


def test_an_evaluation_that_diverges_names_the_step_before_it():
    """One step of a huge rate leaves weights whose logits overflow; the training's own loss was finite."""
    split = make_split(8)
    with pytest.raises(DivergedError, match=r"the evaluation loss is (nan|inf) after step 1") as raised:
        run({"epochs": 1, "learning_rate": 1e38, "warmup_ratio": 0.0, "max_gradient_norm": None}, split=split)
    assert raised.value.step == 1 and raised.value.cause == "loss"


def test_a_term_that_overflows_is_told_from_the_loss():
    class Endless(Watcher):
        def step_values(self):
            return {"penalty": torch.tensor(float("inf") if len(self.calls) > 6 else 0.0)}

    with pytest.raises(DivergedError, match="the method's term is inf at step 3") as raised:
        run(method=Endless())
    assert (raised.value.step, raised.value.cause) == (3, "term")


def test_long_epochs_flush_in_order():
    split = make_split(8 * (2 * STEPS_PER_FLUSH + 3))
    _, rows, _ = run({"epochs": 1}, split=split)
    assert [row["global_step"] for row in rows][:-1] == list(range(1, 2 * STEPS_PER_FLUSH + 4))


def test_decay_spares_biases():
    model, _, _ = run({"epochs": 1, "learning_rate": 1e-8, "weight_decay": 1e7, "warmup_ratio": 0.0})
    fresh = BagOfWords()
    assert model.classifier.weight.norm() < 0.9 * fresh.classifier.weight.norm()
    torch.testing.assert_close(model.classifier.bias, fresh.classifier.bias, atol=1e-6, rtol=0)


def test_phases_are_timed_apart():
    _, _, result = run()
    assert result.times_s["warmup"] == 0 and result.times_s["train"] > 0 and result.times_s["eval"] > 0
    assert len(result.step_times_s) == 12 and min(result.step_times_s) > 0


def test_bf16_computes_logits_in_bf16_and_the_loss_in_float32(monkeypatch):
    dtypes = set()
    real = nn.functional.cross_entropy
    monkeypatch.setattr(
        nn.functional,
        "cross_entropy",
        lambda logits, *args, **kw: dtypes.add(logits.dtype) or real(logits, *args, **kw),
    )
    _, rows, _ = run({"epochs": 1}, engine=replace(CPU, precision="bf16"))
    _, exact, _ = run({"epochs": 1})
    assert rows[0]["train_loss"] != exact[0]["train_loss"]
    assert rows[0]["train_loss"] == pytest.approx(exact[0]["train_loss"], rel=0.02)
    assert dtypes == {torch.float32}


def test_a_model_that_the_fused_path_does_not_cover_is_logged_once(caplog):
    caplog.set_level("INFO", "fwlora")
    run()
    assert caplog.messages == ["the fused path does not cover BagOfWords: the model computes by itself"]
    run(engine=pad_literally(16))
    assert len(caplog.messages) == 1


def test_freed_memory_is_kept_where_the_c_library_can_be_told(monkeypatch):
    import ctypes

    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert keep_freed_memory() is False


def test_asking_for_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnavailableDeviceError, match="torch finds no GPU"):
        choose_device("cuda")
    assert choose_device("auto").type == "cpu"
