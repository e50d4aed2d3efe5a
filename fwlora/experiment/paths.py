"""Folders that the program reads and writes, each defined here alone."""

from __future__ import annotations

import os
from pathlib import Path

from fwlora.experiment.errors import UserError

# The checkout; of an installed package the folder that holds the package.
REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG_DIR = REPOSITORY / "config"
# Relative to the working folder: models, data sets and tokens.
CACHE_DIR = ".cache/"
# The variable that stands for an empty or missing results_dir, as in the image that the Dockerfile makes.
RESULTS_VARIABLE = "RESULTS_DIR"
# The variable that names the folder of what is kept per machine and user.
CACHE_VARIABLE = "FWLORA_CACHE_DIR"
# Below a run's folder and the comparison's, beside which pipelines take every file but two documents for a figure.
REPORT_FOLDER = "report"
LOG_FOLDER = "logs"
# Likewise: records of the attempts at a run, what a stopped one continues from, and the trained model.
ATTEMPTS, CHECKPOINTS, ADAPTER = "attempts", "checkpoint", "adapter"


def find_run_folder(results_dir: str | Path, run_id: str) -> Path:
    """Return the folder of a run's results."""
    return Path(results_dir, run_id)


def find_log(results_dir: str | Path, run_id: str, mode: str) -> Path:
    """Return the path of the log that ``src.main`` appends to."""
    return find_run_folder(results_dir, run_id) / LOG_FOLDER / f"{mode}.log"


def machine_cache() -> Path:
    """Return the folder of what is found out or made once per machine and user; it may not be writable."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or expand_home("~/.cache")) / "fwlora"


def make_writable(folder: Path) -> bool:
    """Make a folder where it is missing; return whether files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def is_path(name: str) -> bool:
    """Return whether a name can only be a folder's: an id of the Hub is a name, or an owner and a name."""
    return name.startswith(("/", "~", ".")) or name.count("/") > 1


def expand_home(name: str) -> Path:
    """Return a path whose ``~`` is the home folder; that of a user whom the system does not know stays as it is."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def find_own_checkout() -> Path | None:
    """Return the checkout that this package lies in; None where it is installed alone."""
    return REPOSITORY if (REPOSITORY / "src" / "main.py").is_file() else None


def find_repository(start: Path) -> Path:
    """Return the checkout that ``start`` lies in: the nearest folder with ``src/main.py`` and ``config/study``.

    Raises:
        UserError: not in a checkout.
    """
    for folder in (start, *start.parents):
        if (folder / "src" / "main.py").is_file() and (folder / "config" / "study").is_dir():
            return folder
    raise UserError(f"{start} is not inside a checkout of fwlora; start the command in one")
