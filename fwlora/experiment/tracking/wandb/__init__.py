"""Weights & Biases as the tracker: writing a run (online or offline) and reading many (server or local files).

The only package that imports ``wandb``, and only inside functions: importing it takes about a second.
"""

from fwlora.experiment.tracking.wandb.settings import WandbSettings

__all__ = ["WandbSettings"]
