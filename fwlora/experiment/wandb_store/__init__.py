"""Weights & Biases as the record of runs: writing one (online or offline) and reading many (API or local files).

The only package that imports ``wandb``, and only inside functions: importing it takes about a second.
"""

from __future__ import annotations

from fwlora.experiment.wandb_store.reading import load_records
from fwlora.experiment.wandb_store.session import end_session
from fwlora.experiment.wandb_store.writing import WandbTarget, start_tracker

__all__ = ["WandbTarget", "end_session", "load_records", "start_tracker"]
