"""GLUE (Wang et al., 2019, arXiv 1804.07461): which columns hold a task's text, and which metric it is judged by.

A task of your own is one call of :func:`register_task`.
"""

from __future__ import annotations

from dataclasses import dataclass

HUB_ID = "nyu-mll/glue"
DEFAULT_METRIC = "accuracy"


@dataclass(frozen=True)
class GlueTask:
    """A task.

    Attributes:
        columns: the columns of an example's one or two texts, in the order the tokenizer takes them.
        metric: the task metric that runs are compared by, a name in
            :mod:`fwlora.experiment.tracking.task_metrics`; a metric of numbers makes the task a regression.
    """

    columns: tuple[str, ...]
    metric: str = DEFAULT_METRIC


_TASKS = {
    "cola": GlueTask(("sentence",), "matthews_correlation"),
    "sst2": GlueTask(("sentence",)),
    "mrpc": GlueTask(("sentence1", "sentence2"), "f1"),
    "qqp": GlueTask(("question1", "question2"), "f1"),
    "stsb": GlueTask(("sentence1", "sentence2"), "pearson_correlation"),
    "mnli": GlueTask(("premise", "hypothesis")),
    "qnli": GlueTask(("question", "sentence")),
    "rte": GlueTask(("sentence1", "sentence2")),
    "wnli": GlueTask(("sentence1", "sentence2")),
}


def register_task(name: str, task: GlueTask) -> None:
    """Add a task under the name that ``run.dataset.subset`` gives it.

    Raises:
        ValueError: another task has the name.
    """
    if _TASKS.get(name, task) != task:
        raise ValueError(f"`name` {name!r} is taken by {_TASKS[name]}; choose another")
    _TASKS[name] = task


def unregister_task(name: str) -> None:
    """Remove a task, if it is registered."""
    _TASKS.pop(name, None)


def known_tasks() -> tuple[str, ...]:
    """Return the names of all tasks."""
    return tuple(_TASKS)


def find_task(subset: str | None) -> GlueTask | None:
    """Return the task that ``run.dataset.subset`` names; None where it names no GLUE task."""
    return _TASKS.get(subset or "")


def find_task_metric(subset: str | None) -> str:
    """Return the task metric of a subset: GLUE's own, accuracy of any other data."""
    task = find_task(subset)
    return DEFAULT_METRIC if task is None else task.metric
