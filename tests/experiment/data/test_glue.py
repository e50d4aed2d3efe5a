"""GLUE's tasks, and one of one's own."""

from __future__ import annotations

import pytest

from fwlora.experiment.data.glue import (
    GlueTask,
    find_task,
    find_task_metric,
    known_tasks,
    register_task,
    unregister_task,
)
from fwlora.experiment.tracking.task_metrics import TASK_METRICS


def test_every_task_has_columns_and_a_metric_that_is_computed():
    assert known_tasks() == ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")
    for name in known_tasks():
        task = find_task(name)
        assert len(task.columns) in (1, 2) and task.metric in TASK_METRICS
    assert find_task("mnli") == GlueTask(("premise", "hypothesis"), "accuracy")
    assert [name for name in known_tasks() if find_task_metric(name) != "accuracy"] == ["cola", "mrpc", "qqp", "stsb"]
    assert [name for name in known_tasks() if TASK_METRICS[find_task_metric(name)].predicts == "numbers"] == ["stsb"]
    assert find_task_metric(None) == find_task_metric("mine") == "accuracy" and find_task(None) is None


def test_a_task_is_added_by_one_call():
    register_task("mine", GlueTask(("claim",), "f1"))
    try:
        assert find_task("mine") == GlueTask(("claim",), "f1") and find_task_metric("mine") == "f1"
        with pytest.raises(ValueError, match="`name` 'mine' is taken"):
            register_task("mine", GlueTask(("other",)))
    finally:
        unregister_task("mine")
    assert find_task("mine") is None
