"""Made-up evidence for reports, and a page read as text."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from fwlora.experiment.evaluation.claims.claim import load_claims
from fwlora.experiment.evaluation.evidence import Evidence
from fwlora.experiment.evaluation.figures.draw import Figures
from fwlora.experiment.evaluation.figures.style import Drawing
from fwlora.experiment.evaluation.report.render import ReportOrigin
from tests.helpers.evaluation_records import change, make_record

CLAIMS = load_claims(Path(__file__).resolve().parents[2] / "config" / "claims")
HOSTILE = "<script>alert(\"x\")</script> & 'ü' </pre>"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
ENVIRONMENT = {
    "commit": "64a8ef9c1f6d3b2e8a7c5d4e3f2a1b0c9d8e7f6a",
    "dirty": False,
    "python": "3.11.9",
    "packages": {"torch": "2.13.0", "peft": "0.21.2"},
    "system": "Linux x86_64",
    "device": "NVIDIA H100",
    "threads": 8,
    "cpu_count": 16,
}
ORIGIN = ReportOrigin("python -m src.evaluate results_dir=results run_ids='[\"a\"]'", {**ENVIRONMENT, "dirty": True})
METHODS = {"baseline_lora": (0.13, 100.0), "adalora": (0.10, 116.0), "proposed_fw_lora": (0.11, 101.0)}
VOID = {"meta", "img", "link", "input", "br", "hr", "wbr"}


def make_run(run_id: str, method: str, seed: int, subset: str = "sst2", dirty: bool = False, **more: Any):
    error_rate, time_s = METHODS[method]
    record = make_record(run_id, method, seed, error_rate=error_rate, subset=subset, time_s=time_s, **more)
    return change(
        record,
        config__resolved__environment={**ENVIRONMENT, "dirty": dirty},
        config__resolved__command=f"python -m src.main run={run_id}",
        config__resolved__train_fingerprint=f"train-{subset}",
        summary__time_eval_s=6.25,
        summary__best_eval_accuracy=0.99,
        summary__best_eval_accuracy_epoch=2,
        summary__encoder_fingerprint="9f31c07be2d4a1f0",
    )


def make_figures(evidence: Evidence, drawing: Drawing) -> Figures:
    return Figures(
        overview={"pooled_difference": drawing},
        cells={cell.slug: {"paired_difference": drawing} for cell in evidence.cells},
        runs={run.run_id: {"learning_curve": drawing, "confusion_matrix": drawing} for run in evidence.runs},
    )


@dataclass
class Page(HTMLParser):
    """What a page holds, and whether its elements are nested as they should be."""

    text: str = ""
    elements: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    tables: dict[str, list[list[tuple[str, str | None]]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self._open: list[str] = []
        self._table = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        assert len(given) == len(attrs), (tag, attrs)
        self.elements.append((tag, given))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self._table = given.get("id", f"table {len(self.tables)}")
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in ("td", "th"):
            self.tables[self._table][-1].append(("", given.get("data-value")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        self.text += data
        if "td" in self._open or "th" in self._open:
            text, value = self.tables[self._table][-1].pop()
            self.tables[self._table][-1].append((text + data, value))

    def column(self, table: str, place: int) -> list[tuple[str, str | None]]:
        return [(" ".join(row[place][0].split()), row[place][1]) for row in self.tables[table][1:]]

    def all(self, *tags: str) -> list[dict[str, str]]:
        return [given for tag, given in self.elements if tag in tags]


def parse(html: bytes) -> Page:
    page = Page()
    page.feed(html.decode())
    page.close()
    assert not page._open
    return page
