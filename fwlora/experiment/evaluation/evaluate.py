"""Evaluation as a whole: records to files in memory, files to disk."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fwlora.experiment.errors import UserError
from fwlora.experiment.evaluation import cell_figures, documents, overview_figures, run_figures, tables
from fwlora.experiment.evaluation.aggregate import aggregate
from fwlora.experiment.evaluation.cells import Cell, group_cells
from fwlora.experiment.evaluation.claims import Claim
from fwlora.experiment.evaluation.comparability import find_warnings
from fwlora.experiment.evaluation.figure_style import Drawing
from fwlora.experiment.evaluation.pairs import compare_pairs
from fwlora.experiment.evaluation.report import ReportOrigin, render_report
from fwlora.experiment.evaluation.request import COMPARISON_FOLDER
from fwlora.experiment.evaluation.resampling import RESAMPLES, resample_runs
from fwlora.experiment.evaluation.runs import EvaluatedRun, read_runs
from fwlora.experiment.evaluation.verdicts import Answer, judge_claims
from fwlora.experiment.records import RunRecord

RNG_SEED = 20_261_121
FEWEST_RUNS_TO_SHARE = 8  # below, starting processes takes longer than what they save


@dataclass(frozen=True)
class Evidence:
    """What the runs show: numbers alone, before anything is drawn or written.

    Attributes:
        runs: checked, in the order of their records.
        cells: what is compared in what.
        statistics: see :func:`fwlora.experiment.evaluation.pairs.compare_pairs`.
        answers: to every claim.
        warnings: what makes the comparison unequal or its numbers doubtful.
    """

    runs: Sequence[EvaluatedRun]
    cells: Sequence[Cell]
    statistics: Mapping[str, Any]
    answers: Sequence[Answer]
    warnings: Sequence[str]


@dataclass(frozen=True)
class Figures:
    """Every figure by topic: over several cells, of each cell (by condition), of each run (by run id)."""

    overview: Mapping[str, Drawing]
    cells: Mapping[str, Mapping[str, Drawing]]
    runs: Mapping[str, Mapping[str, Drawing]]

    def files(self, results_dir: Path) -> dict[Path, bytes]:
        """The PDFs, whose names are unique over all runs and cells."""
        found = {
            results_dir / run_id / f"{run_id}_{topic}.pdf": drawing.pdf
            for run_id, drawings in self.runs.items()
            for topic, drawing in drawings.items()
        }
        folder = results_dir / COMPARISON_FOLDER
        found.update({folder / f"comparison_{topic}.pdf": drawing.pdf for topic, drawing in self.overview.items()})
        for condition, drawings in self.cells.items():
            suffix = f"_{condition}" if len(self.cells) > 1 else ""
            found.update({folder / f"comparison_{topic}{suffix}.pdf": each.pdf for topic, each in drawings.items()})
        return found


@dataclass(frozen=True)
class Evaluation:
    """Everything evaluation produces, before any of it is written.

    Attributes:
        summary: text for the terminal: the table of results, the verdicts and the warnings.
        files: contents by path, runs' files first, then the comparison's.
    """

    summary: str
    files: Mapping[Path, bytes]


def collect_records(load: Callable[[Sequence[str]], list[RunRecord]], run_ids: Sequence[str]) -> list[RunRecord]:
    """Records of all runs; where some cannot be read, what is wrong with the others is reported with them.

    Args:
        load: reads records; names each run that it cannot read as `` `<run_id>`: reason `` in its UserError.
        run_ids: what to read.

    Raises:
        UserError: runs that cannot be read, and runs that could be but cannot be compared.
    """
    try:
        return load(run_ids)
    except UserError as error:
        message = str(error)
        readable = [run_id for run_id in run_ids if f"`{run_id}`:" not in message]
        if len(readable) in (0, len(run_ids)):
            raise
        try:
            read_runs(load(readable))
        except UserError as other:
            message += f"\n{other}"
        raise UserError(message) from None


def gather_evidence(
    records: Sequence[RunRecord], claims: Mapping[str, Claim], rng_seed: int = RNG_SEED, resamples: int = RESAMPLES
) -> Evidence:
    """Check, compare and judge.

    Args:
        records: one per run.
        claims: to be answered, by id.
        rng_seed: of all resampling.
        resamples: of the bootstrap.

    Raises:
        UserError: runs that cannot be compared, all of them named.
    """
    runs = read_runs(records)
    cells = group_cells(runs)
    resampled = resample_runs(runs, rng_seed, resamples)
    return Evidence(
        runs=runs,
        cells=cells,
        statistics=compare_pairs(cells, resampled, rng_seed),
        answers=judge_claims(claims, cells, resampled, rng_seed),
        warnings=find_warnings(cells),
    )


def draw_figures(evidence: Evidence, workers: int = 1) -> Figures:
    """Every figure, in both forms; the same bytes whatever the number of processes that draw them.

    Args:
        evidence: what to draw.
        workers: processes to share the work with, where there is enough of it.
    """
    with ExitStack() as stack:
        draw_all: Callable[..., Iterable[Mapping[str, Drawing]]] = map
        if workers > 1 and len(evidence.runs) >= FEWEST_RUNS_TO_SHARE:
            context = multiprocessing.get_context("spawn")
            # An interrupt is for the process that the user started; it ends the others.
            pool = ProcessPoolExecutor(workers, context, signal.signal, (signal.SIGINT, signal.SIG_IGN))
            draw_all = stack.enter_context(pool).map
        # Cells are drawn here meanwhile: each holds all of its runs, which would be in memory twice.
        runs = draw_all(run_figures.draw_run, evidence.runs)
        cells = {cell.condition: cell_figures.draw_cell(cell, evidence.statistics) for cell in evidence.cells}
        overview = overview_figures.draw_overview(evidence.cells, evidence.statistics)
        return Figures(overview, cells, dict(zip((run.run_id for run in evidence.runs), runs, strict=True)))


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def evaluate_records(
    records: Sequence[RunRecord],
    results_dir: Path,
    claims: Mapping[str, Claim],
    made_by: ReportOrigin,
    rng_seed: int = RNG_SEED,
    resamples: int = RESAMPLES,
    workers: int = 1,
) -> Evaluation:
    """Check, compare, judge and draw; equal records give byte-equal files.

    Args:
        records: one per run, in the order in which their files are to be listed.
        results_dir: prefix of all paths; nothing is read from or written to it.
        claims: to be answered, by id.
        made_by: what the report says of this evaluation itself.
        rng_seed: of all resampling.
        resamples: of the bootstrap.
        workers: processes that draw.

    Raises:
        UserError: runs that cannot be compared, all of them named.
    """
    evidence = gather_evidence(records, claims, rng_seed, resamples)
    figures = draw_figures(evidence, workers)
    pictures = figures.files(results_dir)
    files: dict[Path, bytes] = {}
    for run in evidence.runs:
        folder = results_dir / run.run_id
        files[folder / "metrics.json"] = documents.to_json(documents.describe_run(run))
        files[folder / "history.json"] = documents.to_json(documents.describe_history(run))
        files.update({path: content for path, content in pictures.items() if path.parent == folder})
    cells, statistics, warnings = evidence.cells, evidence.statistics, evidence.warnings
    folder = results_dir / COMPARISON_FOLDER
    files[folder / "report.html"] = render_report(evidence, figures, made_by)
    files[folder / "aggregated_metrics.json"] = documents.to_json(aggregate(cells, warnings))
    files[folder / "statistics.json"] = documents.to_json(statistics)
    files[folder / "claims.json"] = documents.to_json(documents.describe_answers(evidence.answers))
    markdown = tables.render_markdown(evidence.answers, cells, statistics, warnings)
    files[folder / "comparison_table.md"] = markdown.encode()
    files[folder / "comparison_table.tex"] = tables.render_latex(cells, statistics).encode()
    files[folder / "comparison_table.csv"] = tables.render_csv(cells).encode()
    files.update({path: content for path, content in pictures.items() if path.parent == folder})
    summary = [tables.render_text_table(cells), *tables.render_verdicts(evidence.answers)]
    summary += [f"warning: {warning}" for warning in warnings]
    return Evaluation("\n".join(summary), files)


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write every file under a temporary name, then rename them all: what cannot be written leaves the rest as it was.

    Raises:
        UserError: a folder or file that cannot be written.
    """
    temporaries = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files}
    path = Path()
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            temporaries[path].write_bytes(content)
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"results_dir: cannot write {path}: {reason}; give a writable results_dir=<dir>") from None
    finally:
        for temporary in temporaries.values():
            with suppress(OSError):
                temporary.unlink()
