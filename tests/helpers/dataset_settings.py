"""Settings of data sets that tests share."""

from __future__ import annotations

from fwlora.experiment.settings.schema import DatasetSettings


def make_dataset(name: str, **options) -> DatasetSettings:
    """The node ``run.dataset`` of a data set, as a run file without further keys has it."""
    defaults = {
        "subset": None, "revision": None, "split": "train", "eval_split": "validation", "max_length": 128,
        "padding": "max_length", "truncation": True, "text_columns": None, "label_column": "label",
        "train_examples": None, "eval_examples": None, "subset_seed": 0,
    }  # fmt: skip
    return DatasetSettings(name=str(name), **{**defaults, **options})
