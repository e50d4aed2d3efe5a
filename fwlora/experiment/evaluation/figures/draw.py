"""Draw every figure of an evaluation, in several processes where there are many."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fwlora.experiment.evaluation.evidence import Evidence
from fwlora.experiment.evaluation.figures.cell import draw_cell
from fwlora.experiment.evaluation.figures.overview import draw_overview
from fwlora.experiment.evaluation.figures.run import draw_run
from fwlora.experiment.evaluation.figures.style import Drawing
from fwlora.experiment.evaluation.figures.worker import prepare_worker
from fwlora.experiment.evaluation.request import COMPARISON_FOLDER

MIN_RUNS_TO_SHARE = 8  # below, starting processes takes longer than what they save


@dataclass(frozen=True)
class Figures:
    """Every figure by topic: over several cells, of each cell (by slug), of each run (by run id)."""

    overview: Mapping[str, Drawing]
    cells: Mapping[str, Mapping[str, Drawing]]
    runs: Mapping[str, Mapping[str, Drawing]]

    def files(self, results_dir: Path) -> dict[Path, bytes]:
        """List the PDFs by path; their names are unique over all runs and cells."""
        found = {
            results_dir / run_id / self.name_of_run(run_id, topic): drawing.pdf
            for run_id, drawings in self.runs.items()
            for topic, drawing in drawings.items()
        }
        folder = results_dir / COMPARISON_FOLDER
        found.update({folder / self.name(topic): drawing.pdf for topic, drawing in self.overview.items()})
        for slug, drawings in self.cells.items():
            found.update({folder / self.name(topic, slug): each.pdf for topic, each in drawings.items()})
        return found

    def name(self, topic: str, slug: str | None = None) -> str:
        """Return the file name of a figure of the comparison, with the cell's slug where there are several cells."""
        suffix = f"_{slug}" if slug and len(self.cells) > 1 else ""
        return f"comparison_{topic}{suffix}.pdf"

    @staticmethod
    def name_of_run(run_id: str, topic: str) -> str:
        """Return the file name of a figure of a run."""
        return f"{run_id}_{topic}.pdf"


def draw_figures(evidence: Evidence, workers: int = 1) -> Figures:
    """Draw every figure, in both forms; the number of processes does not change their bytes.

    Args:
        evidence: what to draw.
        workers: processes to share the work with, where there is enough of it.
    """
    if workers == 1 or len(evidence.runs) < MIN_RUNS_TO_SHARE:
        return _draw(evidence, map)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), prepare_worker)
    try:
        return _draw(evidence, pool.map)
    finally:
        # After an interrupt only the figures that are being drawn are waited for.
        pool.shutdown(cancel_futures=True)


def _draw(evidence: Evidence, draw_all: Callable[..., Iterable[Mapping[str, Drawing]]]) -> Figures:
    runs = draw_all(draw_run, evidence.runs)
    # Cells are drawn here meanwhile: each holds all of its runs, which would be in memory twice.
    cells = {cell.slug: draw_cell(cell, evidence.comparison) for cell in evidence.cells}
    overview = draw_overview(evidence.cells, evidence.comparison)
    return Figures(overview, cells, dict(zip((run.run_id for run in evidence.runs), runs, strict=True)))


def available_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
