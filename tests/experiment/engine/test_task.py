"""What a training learns: classes and numbers, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fwlora.experiment.data.batching import TokenizedSplit
from fwlora.experiment.engine.loop import train
from fwlora.experiment.engine.task import RegressionTask, Task, make_task
from fwlora.experiment.tracking import metrics
from tests.gate.training_cases import attach_method, make_options, make_split
from tests.helpers.engine_options import CPU, pad_literally

NUMBERS = RegressionTask(pad_token_id=1, num_classes=1, task_metric="pearson_correlation")


def test_classes_make_a_task_of_classes_and_none_a_regression():
    assert make_task(0, 3, "f1", pad_left=True, max_length=9) == Task(0, 3, "f1", True, 9)
    regression = make_task(0, 0, "pearson_correlation", pad_left=False, max_length=None)
    assert regression == RegressionTask(0, 1, "pearson_correlation")
    assert Task.counts_correct and not regression.counts_correct


def test_the_loss_of_numbers_is_their_squared_error_and_ignored_ones_count_nothing():
    outputs = torch.tensor([[1.0], [2.0], [4.0]], requires_grad=True)
    labels = torch.tensor([0.5, 4.0, 100.0])
    NUMBERS.ignore(labels[2:])
    loss = NUMBERS.sum_losses(outputs, labels)
    loss.backward()
    assert loss.item() == 0.25 + 4.0 and outputs.grad.tolist() == [[1.0], [-4.0], [0.0]]
    assert NUMBERS.predict(outputs).tolist() == [1.0, 2.0, 4.0] and float(NUMBERS.count_correct(outputs, labels)) == 0
    assert NUMBERS.predict(outputs.bfloat16()).dtype == torch.float32


def test_scores_of_numbers():
    scores = NUMBERS.score(np.array([0.0, 1.0, 5.0], np.float32), np.array([0.1, 0.3, 0.2], np.float32))
    # By hand: ranks (1, 2, 3) and (1, 3, 2); deviations (-2, -1, 3) and (-0.1, 0.1, 0).
    assert scores == pytest.approx(
        {"pearson_correlation": 0.1 / np.sqrt(14 * 0.02), "spearman_correlation": 0.5}, abs=1e-6
    )


def make_numbers(examples: int, seed: int) -> TokenizedSplit:
    """Labels are five times the share of even tokens."""
    split = make_split(examples, seed)
    places = zip(split.offsets[:-1], split.offsets[1:], strict=True)
    labels = 5 * np.array([np.mean(split.tokens[start + 1 : end] % 2 == 0) for start, end in places], dtype=np.float32)
    return TokenizedSplit(split.tokens, split.segments, split.offsets, labels)


@pytest.mark.parametrize("engine", [CPU, pad_literally(16)], ids=["fused", "plain"])
@pytest.mark.parametrize("method_name", ["head", "lora", "adalora", "fw_lora"])
def test_a_regression_trains_by_the_loop(method_name, engine):
    model, method = attach_method(method_name, {}, num_labels=1)
    evaluation = make_numbers(24, 1)
    rows = []
    result = train(
        model,
        method,
        make_numbers(60, 0),
        evaluation,
        make_options(),
        NUMBERS,
        engine,
        log=lambda row: rows.append(row),
    )
    gold, predicted = evaluation.labels.astype(float), result.last.predictions.astype(float)
    assert result.last.predictions.dtype == np.float32 and predicted.shape == gold.shape
    assert result.last.loss == pytest.approx(np.mean((predicted - gold) ** 2), rel=1e-6)
    assert result.last.loss < 0.5 * np.mean(gold**2)
    correlation = result.last.values["eval_pearson_correlation"]
    assert correlation == pytest.approx(np.corrcoef(gold, predicted)[0, 1], abs=1e-6)
    assert set(result.last.values) == {"eval_loss", "eval_pearson_correlation", "eval_spearman_correlation"}
    assert all(metrics.TRAIN_EPOCH_ACCURACY not in row for row in rows) and metrics.TRAIN_EPOCH_LOSS in rows[-1]
