"""Evaluate finished runs: ``python -m src.evaluate results_dir=<dir> run_ids='["a","b"]'``."""

from __future__ import annotations

import io
import os
import shlex
import sys
from collections.abc import Sequence

from fwlora.experiment.errors import user_errors_exit
from fwlora.experiment.paths import CONFIG_DIR, REPOSITORY


def main(arguments: Sequence[str]) -> int:
    """Parse, load, compare, write; print the results, then every path written."""
    with user_errors_exit():
        # Processes that draw figures import this module, too, and should stay small.
        from fwlora.experiment.evaluation.claims.claim import load_claims
        from fwlora.experiment.evaluation.evaluate import (
            clean_up,
            collect_records,
            evaluate_records,
            find_stale_figures,
            write_results,
        )
        from fwlora.experiment.evaluation.figures.draw import available_cores
        from fwlora.experiment.evaluation.report.render import ReportOrigin
        from fwlora.experiment.evaluation.request import parse_request, usage
        from fwlora.experiment.plugins import load_plugins
        from fwlora.experiment.tracking import open_source
        from fwlora.experiment.tracking.environment import describe_environment, name_cpu

        load_plugins()
        if any(argument in ("-h", "--help") for argument in arguments):
            print(usage())
            return 0
        request = parse_request(arguments, os.environ, CONFIG_DIR / "config.yaml")
        claims = load_claims(CONFIG_DIR / "claims")
        source = open_source(request.tracker_settings, results_dir=request.results_dir, source=request.source)
        records = collect_records(source, request.run_ids)
        command = shlex.join(["python", "-m", "src.evaluate", *arguments])
        made_by = ReportOrigin(command, describe_environment(REPOSITORY, name_cpu()))
        evaluation = evaluate_records(
            records, request.results_dir, claims, made_by, workers=available_cores(), choice=request.pairs
        )
        stale = find_stale_figures(evaluation.files)
        write_results(evaluation.files)
        clean_up(evaluation.files, stale)
        print_lines([evaluation.summary, *map(str, evaluation.files)])
    return 0


def print_lines(lines: Sequence[str]) -> None:
    """Print all of them, or as many as the reader of a pipe takes, in whatever characters the terminal has."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
