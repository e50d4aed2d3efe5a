"""The whole evaluation: from records to files in memory, and from there to disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fwlora.experiment.errors import UserError
from fwlora.experiment.evaluation.claims.claim import Claim
from fwlora.experiment.evaluation.compare.bootstrap import RESAMPLES
from fwlora.experiment.evaluation.compare.cells import PairChoice
from fwlora.experiment.evaluation.compare.runs import read_runs
from fwlora.experiment.evaluation.evidence import RNG_SEED, gather_evidence
from fwlora.experiment.evaluation.figures.draw import draw_figures
from fwlora.experiment.evaluation.figures.font import find_missing_characters
from fwlora.experiment.evaluation.output import documents, tables
from fwlora.experiment.evaluation.output.aggregate import aggregate
from fwlora.experiment.evaluation.report.render import ReportOrigin, render_report
from fwlora.experiment.evaluation.request import COMPARISON_FOLDER
from fwlora.experiment.files import remove_partials, write_files
from fwlora.experiment.paths import REPORT_FOLDER
from fwlora.experiment.tracking import RecordSource
from fwlora.experiment.tracking.records import RunRecord, UnreadableRunsError

SHOWN_CHARACTERS = 20
MANIFEST = "figures.json"
# No evaluation writes its files for so long.
ABANDONED_S = 3600.0


@dataclass(frozen=True)
class EvaluationOutput:
    """Everything evaluation produces, before any of it is written.

    Attributes:
        summary: text for the terminal: the table of results, the verdicts and the warnings.
        files: contents by path, runs' files first, then the comparison's.
    """

    summary: str
    files: Mapping[Path, bytes]


def collect_records(source: RecordSource, run_ids: Sequence[str]) -> list[RunRecord]:
    """Read the records of all runs; where some cannot be read, report what is wrong with the others as well.

    Args:
        source: where the records are read.
        run_ids: of the runs.

    Raises:
        UserError: runs that cannot be read, and runs that can be read but not compared.
    """
    try:
        return source.load(run_ids)
    except UnreadableRunsError as error:
        readable = [run_id for run_id in run_ids if run_id not in error.reasons]
        if not readable:
            raise
        try:
            read_runs(source.load(readable))
        except UserError as other:
            raise UserError(f"{error}\n{other}") from None
        raise


def evaluate_records(
    records: Sequence[RunRecord],
    results_dir: Path,
    claims: Mapping[str, Claim],
    made_by: ReportOrigin,
    rng_seed: int = RNG_SEED,
    resamples: int = RESAMPLES,
    workers: int = 1,
    choice: PairChoice | None = None,
) -> EvaluationOutput:
    """Check, compare, judge and draw; equal records give byte-equal files.

    Args:
        records: one per run, in the order in which their files are to be listed.
        results_dir: prefix of all paths; nothing is read from or written to it.
        claims: to be judged, by id.
        made_by: command and environment of this evaluation, for the report.
        rng_seed: of all resampling.
        resamples: of the bootstrap.
        workers: processes that draw.
        choice: which pairs of methods are compared; None for the usual ones.

    Raises:
        UserError: runs that cannot be compared, all of them named.
    """
    evidence = gather_evidence(records, claims, rng_seed, resamples, choice)
    figures = draw_figures(evidence, workers)
    pictures = figures.files(results_dir)
    files: dict[Path, bytes] = {}
    for run in evidence.runs:
        folder = results_dir / run.run_id
        files[folder / "metrics.json"] = documents.to_json(documents.describe_run(run))
        files[folder / REPORT_FOLDER / "history.json"] = documents.to_json(documents.describe_history(run))
        files.update(_figures_of(folder, pictures))
    cells, comparison, warnings = evidence.cells, evidence.comparison, evidence.warnings
    results = evidence.claim_results
    folder = results_dir / COMPARISON_FOLDER
    below = folder / REPORT_FOLDER
    files[below / "report.html"] = render_report(evidence, figures, made_by)
    files[folder / "aggregated_metrics.json"] = documents.to_json(aggregate(cells, warnings))
    files[below / "statistics.json"] = documents.to_json(documents.describe_comparison(comparison, cells))
    files[below / "claims.json"] = documents.to_json(documents.describe_claim_results(results))
    markdown = tables.render_markdown(results, cells, comparison, warnings)
    files[below / "comparison_table.md"] = markdown.encode()
    files[below / "comparison_table.tex"] = tables.render_latex(cells, comparison).encode()
    files[below / "comparison_table.csv"] = tables.render_csv(cells).encode()
    files.update(_figures_of(folder, pictures))
    summary = [tables.render_text_table(cells), *tables.render_verdicts(results)]
    summary += [f"warning: {warning}" for warning in warnings]
    names = [name for run in evidence.runs for name in (run.run_id, *run.label_names)]
    missing = find_missing_characters([*names, *(cell.name for cell in cells)])
    if missing:
        summary.append(
            f"warning: figures show boxes for {missing[:SHOWN_CHARACTERS]!r}, which no font of theirs has; install "
            "one, such as Debian's fonts-noto-cjk"
        )
    return EvaluationOutput("\n".join(summary), files)


def write_results(files: Mapping[Path, bytes]) -> None:
    """Write every file, or none of them.

    Raises:
        UserError: a folder or file that cannot be written.
    """
    try:
        write_files(files)
    except OSError as error:
        raise UserError(
            f"results_dir: cannot write {error.filename}: {error.strerror}; give a writable results_dir=<dir>"
        ) from None


def find_stale_figures(files: Mapping[Path, bytes]) -> list[Path]:
    """List the figures that an earlier evaluation made in folders that are to be written, and this one does not.

    What an evaluation made is what its manifest names, ``report/figures.json`` in each folder.

    Args:
        files: all that is to be written.
    """
    stale = []
    for manifest in (path for path in files if path.name == MANIFEST):
        folder = manifest.parent.parent
        with suppress(OSError, ValueError, TypeError, RecursionError):
            names = json.loads(manifest.read_text(encoding="utf-8"))["figures"]
            made = [folder / name for name in names if Path(name).name == name and name.endswith(".pdf")]
            stale += [path for path in made if path not in files]
    return stale


def clean_up(files: Mapping[Path, bytes], stale: Sequence[Path]) -> None:
    """Remove stale figures, and what evaluations that were killed left incomplete in the folders that were written.

    Args:
        files: all that was written.
        stale: of :func:`find_stale_figures`.
    """
    for path in stale:
        with suppress(OSError):
            path.unlink()
    for folder in {path.parent for path in files}:
        remove_partials(folder, older_than_s=ABANDONED_S)


def _figures_of(folder: Path, pictures: Mapping[Path, bytes]) -> dict[Path, bytes]:
    """Return a folder's figures with their manifest; nothing where it has none."""
    own = {path: content for path, content in pictures.items() if path.parent == folder}
    names = sorted(path.name for path in own)
    return {**own, folder / REPORT_FOLDER / MANIFEST: documents.to_json({"figures": names})} if own else own
