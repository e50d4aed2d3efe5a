"""Where things lie."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG_DIR = REPOSITORY / "config"
HELPERS = Path(__file__).resolve().parent
