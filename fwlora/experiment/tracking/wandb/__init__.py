"""Weights & Biases as the record of runs: writing one (online or offline) and reading many (API or local files).

The only package that imports ``wandb``, and only inside functions: importing it takes about a second.
"""

from __future__ import annotations

from fwlora.experiment.tracking.wandb.reading import load_records
from fwlora.experiment.tracking.wandb.session import end_session
from fwlora.experiment.tracking.wandb.writing import WandbTarget, start_tracker

__all__ = ["WandbTarget", "end_session", "load_records", "start_tracker"]
