"""The evaluation of recorded runs: every file that it makes."""

from __future__ import annotations

import json
from pathlib import Path

from fwlora.experiment.evaluation.claims.claim import load_claims
from fwlora.experiment.evaluation.evaluate import evaluate_records
from fwlora.experiment.evaluation.report.render import ReportOrigin
from fwlora.experiment.tracking.records import RunRecord

FOLDER = Path(__file__).parent
CLAIMS = FOLDER.parents[1] / "config" / "claims"
TEXT_ENDINGS = (".json", ".md", ".tex", ".csv")
RESAMPLES = 300


def read_records() -> list[RunRecord]:
    """Read the recorded runs that lie beside this file."""
    return [RunRecord(**fields) for fields in json.loads((FOLDER / "records.json").read_text())]


def evaluate() -> dict[str, str | None]:
    """Evaluate the recorded runs.

    Returns:
        Path -> text of every JSON document and table, None for a file whose name alone counts (figures, the report).
    """
    origin = ReportOrigin("the gate", {})
    made = evaluate_records(read_records(), Path("results"), load_claims(CLAIMS), origin, resamples=RESAMPLES)
    return {
        path.as_posix(): content.decode() if path.suffix in TEXT_ENDINGS else None
        for path, content in sorted(made.files.items())
    }
