"""Record what a refactoring must not change: ``python -m tests.gate.record <folder>`` writes it from this checkout."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.gate import evaluation_case, training_cases

FILES = ("training.json", "evaluation.json")


def record(folder: Path) -> None:
    """Write both documents; floats keep every digit."""
    documents: tuple[dict[str, Any], ...] = (training_cases.run_cases(), evaluation_case.evaluate())
    folder.mkdir(parents=True, exist_ok=True)
    for name, document in zip(FILES, documents, strict=True):
        (folder / name).write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    record(Path(sys.argv[1]))
