"""Where things lie."""

from pathlib import Path

from fwlora.experiment.paths import CONFIG_DIR, REPOSITORY

HELPERS = Path(__file__).resolve().parent

__all__ = ["CONFIG_DIR", "HELPERS", "REPOSITORY"]
