"""What src.train does around a training: choices, messages, and the summary of a run by hand."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fwlora.budget import MatrixShape
from fwlora.config import RankPlan
from fwlora.experiment.data.text import TaskData, make_split
from fwlora.experiment.engine.loop import EvaluationResult, TrainingResult
from fwlora.experiment.engine.meters import DivergedError
from fwlora.experiment.engine.optimizer import ScheduleError
from fwlora.experiment.engine.task import RegressionTask, Task
from fwlora.experiment.errors import UserError
from fwlora.experiment.fused.compiled import NoKernelsError, load_kernels
from fwlora.experiment.modeling.build import AdaptedModel
from fwlora.experiment.run import (
    RunInputs,
    choose_engine,
    describe_task,
    engine_errors_name_settings,
    print_log_lines,
    summarize_run,
)
from fwlora.experiment.settings.hydra_arguments import compose_settings
from fwlora.experiment.tracking.records import unpack_logits, unpack_values
from tests.helpers.engine_options import CPU
from tests.helpers.paths import CONFIG_DIR

ARGUMENTS = ["run=proposed-roberta-base-110M--CoLA-GLUE", "mode=full", "results_dir=out"]


def compose(*overrides: str):
    return compose_settings([*ARGUMENTS, *overrides], CONFIG_DIR, {})


def make_tokenizer(**values) -> SimpleNamespace:
    return SimpleNamespace(**{"pad_token_id": 1, "eos_token_id": 2, "padding_side": "right", **values})


def make_data(label_names: tuple[str, ...], metric: str) -> TaskData:
    split = make_split((["a", "b"],), np.array([0, 1]))
    return TaskData("t", label_names, metric, split, split)


def test_a_task_is_described_from_data_tokenizer_and_settings():
    data = make_data(("no", "yes", "maybe"), "f1")
    assert describe_task(compose(), data, make_tokenizer()) == Task(1, 3, "f1", False, 128)
    left = make_tokenizer(pad_token_id=None, padding_side="left")
    assert describe_task(compose(), data, left) == Task(2, 3, "f1", True, 128)
    numbers = make_data((), "pearson_correlation")
    assert describe_task(compose(), numbers, make_tokenizer()) == RegressionTask(
        1, 1, "pearson_correlation", False, 128
    )
    with pytest.raises(UserError, match="its tokenizer has neither a padding nor an end-of-text token"):
        describe_task(compose(), data, make_tokenizer(pad_token_id=None, eos_token_id=None))


MATRICES = [MatrixShape("a", 384, 384), MatrixShape("b", 384, 1536)]


def test_the_engine_is_literal_where_it_must_not_be_fast(monkeypatch):
    def choose(*arguments: str):
        return choose_engine(compose("engine.device=cpu", "engine.precision=fp32", *arguments), MATRICES)[0]

    fast = choose()
    assert (fast.pad_to, fast.group_by_length, fast.fused, fast.cuda_graphs) == (None, False, True, False)
    assert choose("engine.batches=by_length").group_by_length
    assert fast.kernels is load_kernels(torch.float32)
    assert choose("engine.compiled=false").kernels is None
    literal = choose("engine.fast=false", "run.dataset.max_length=77")
    assert (literal.pad_to, literal.group_by_length, literal.fused, literal.kernels) == (77, False, False, None)
    longest = choose("engine.fast=false", "run.dataset.padding=longest")
    assert (longest.pad_to, longest.group_by_length, longest.fused) == (None, False, False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^engine\.device = cuda: .*; use engine\.device=cpu or auto$"):
        choose_engine(compose("engine.device=cuda"), MATRICES)


def test_the_precision_is_the_set_one_or_the_faster_one_that_the_run_allows(monkeypatch, tmp_path, caplog):
    caplog.set_level("INFO", "fwlora")
    monkeypatch.setenv("FWLORA_CACHE_DIR", str(tmp_path))
    asked = []

    def choose(*arguments: str):
        engine, timings = choose_engine(compose("engine.device=cpu", "engine.compiled=false", *arguments), MATRICES)
        return engine.precision, timings

    def measure(shapes, device):
        asked.append(shapes)
        return {"fp32": 3e-3, "bf16": 1e-3}

    monkeypatch.setattr("fwlora.experiment.run.time_products", measure)
    assert choose("run.training.mixed_precision=fp32") == ("fp32", None)
    assert choose("run.training.mixed_precision=bf16", "engine.precision=bf16") == ("bf16", None)
    assert choose("run.training.mixed_precision=bf16", "engine.precision=fp32") == ("fp32", None)
    assert asked == [] and caplog.messages == []
    for _ in range(2):
        assert choose("run.training.mixed_precision=bf16") == ("bf16", {"fp32": 3e-3, "bf16": 1e-3})
    assert asked == [[(384, 384), (1536, 384)]], "once per machine"
    assert len(caplog.messages) == 2 and "computing in bf16" in caplog.messages[0]
    with pytest.raises(UserError, match=r"engine\.precision = bf16: run\.training\.mixed_precision = fp32"):
        choose("run.training.mixed_precision=fp32", "engine.precision=bf16")


def test_where_nothing_compiles_torchs_operations_compute(monkeypatch, caplog):
    caplog.set_level("INFO", "fwlora")

    def fail(dtype):
        raise NoKernelsError("no C compiler")

    monkeypatch.setattr("fwlora.experiment.run.load_kernels", fail)
    engine, _ = choose_engine(compose("engine.device=cpu", "engine.precision=fp32"), MATRICES)
    assert engine.kernels is None and "no C compiler" in caplog.messages[0]


def test_errors_of_the_engine_name_the_setting_to_change():
    with pytest.raises(UserError, match="loss is nan at step 3") as raised, engine_errors_name_settings():
        raise DivergedError("the training loss is nan at step 3", step=3)
    assert "lower run.training.learning_rate" in str(raised.value)
    with pytest.raises(UserError) as raised, engine_errors_name_settings():
        raise DivergedError("the method's term is inf at step 3", step=3, cause="term")
    assert "run.fw_lora.lambda_fw" in str(raised.value) and "learning_rate" not in str(raised.value)
    with pytest.raises(UserError) as raised, engine_errors_name_settings():
        raise ScheduleError("polynomial", {"power": "x"}, 0.1, "power must be a number")
    assert "run.training.lr_scheduler = polynomial" in str(raised.value)
    assert "run.training.lr_scheduler_options = {'power': 'x'}" in str(raised.value)
    with pytest.raises(ZeroDivisionError), engine_errors_name_settings():
        _ = 1 / 0


def test_log_lines_of_the_package_are_printed_and_of_no_other(capsys):
    package, module = logging.getLogger("fwlora"), logging.getLogger("fwlora.experiment.run")
    before = (package.level, package.propagate, list(package.handlers))
    module.disabled = True
    try:
        print_log_lines()
        module.info("one line")
        logging.getLogger("another").warning("not this one")
    finally:
        package.level, package.propagate, package.handlers = before
    assert capsys.readouterr().out == "one line\n"


def test_a_summary_by_hand():
    rows = [
        {"epoch": 1, "eval_loss": 0.5, "eval_accuracy": 0.5},
        {"epoch": 2, "eval_loss": 0.7, "eval_accuracy": 1.0},
        {"epoch": 3, "eval_loss": 0.6, "eval_accuracy": 0.75},
    ]
    result = TrainingResult(
        last=EvaluationResult(
            0.6, {"eval_loss": 0.6, "eval_accuracy": 0.75}, np.array([1, 0, 1, 1]), np.array([[0.5, 2.0]] * 4)
        ),
        epochs=rows,
        times_s={"warmup": 1.5, "train": 4.0, "eval": 0.25},
        step_times_s=[0.1, 0.4, 0.2],
        total_steps=9,
        peak_memory_mib=12.5,
        cpu_time_s=7.25,
    )
    table = SimpleNamespace(names=["q", "v"], ranks=[2, 1], importances=[0.75, 0.25], delta_norms=[3.0, 1.0])
    pairs = [SimpleNamespace(rank=rank, A=torch.zeros(rank, 4), B=torch.zeros(6, rank), E=None) for rank in (2, 1)]
    method = SimpleNamespace(adapter_table=lambda: table, pairs=pairs, active_ranks=lambda: [2, 1])
    adapted = AdaptedModel(torch.nn.Linear(1, 1), method, {"params_adapter": 30}, "encoder")
    plan = RankPlan(
        [MatrixShape("q", 4, 6), MatrixShape("v", 4, 6)], {"q": 2, "v": 1}, encoder_parameters=600, budget=30
    )
    data, split = make_data(("no", "yes"), "accuracy"), SimpleNamespace(labels=np.array([1, 0, 1, 0]))
    inputs = RunInputs(data, None, plan, Task(0, 2, "accuracy"), CPU, split, split)
    summary = summarize_run(result, adapted, inputs, search_time_s=2.0)
    assert unpack_values(summary.pop("eval_predictions")).tolist() == [1, 0, 1, 1]
    assert unpack_values(summary.pop("eval_labels")).tolist() == [1, 0, 1, 0]
    assert unpack_logits(summary.pop("eval_logits")).tolist() == [[0.5, 2.0]] * 4
    assert summary.pop("load_average") >= 0
    assert summary == {
        "primary_metric": "eval_accuracy",
        "training_time_s": 5.5,
        "time_warmup_s": 1.5,
        "time_train_s": 4.0,
        "time_eval_s": 0.25,
        "time_search_s": 2.0,
        "cpu_time_s": 7.25,
        "step_time_median_s": 0.2,
        "peak_memory_mib": 12.5,
        "total_steps": 9,
        "params_adapter": 30,
        "params_adapter_final": 30,
        "adapter_percent_of_encoder": 5.0,
        "module_names": ["q", "v"],
        "module_ranks": [2, 1],
        "module_importances": [0.75, 0.25],
        "module_delta_norms": [3.0, 1.0],
        "encoder_fingerprint": "encoder",
        "eval_fingerprint": inputs.data.evaluation.fingerprint,
        "final_eval_loss": 0.6,
        "best_eval_loss": 0.5,
        "best_eval_loss_epoch": 1,
        "final_eval_accuracy": 0.75,
        "best_eval_accuracy": 1.0,
        "best_eval_accuracy_epoch": 2,
    }
