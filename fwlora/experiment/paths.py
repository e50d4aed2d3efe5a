"""Folders that the program reads and writes, each defined here alone."""

from __future__ import annotations

from pathlib import Path

# The checkout; of an installed package the folder that holds the package.
REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG_DIR = REPOSITORY / "config"
# Relative to the working folder: models, data sets and tokens.
CACHE_DIR = ".cache/"
# Below a run's folder and the comparison's, beside which pipelines take every file but two documents for a figure.
REPORT_FOLDER = "report"
LOG_FOLDER = "logs"


def find_log(results_dir: str | Path, run_id: str, mode: str) -> Path:
    """Return the path of the log that ``src.main`` appends to."""
    return Path(results_dir, run_id, LOG_FOLDER, f"{mode}.log")


def is_path(name: str) -> bool:
    """Return whether a name can only be a folder's: an id of the Hub is a name, or an owner and a name."""
    return name.startswith(("/", "~", ".")) or name.count("/") > 1


def expand_home(name: str) -> Path:
    """Return a path whose ``~`` is the home folder; that of a user whom the system does not know stays as it is."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)
