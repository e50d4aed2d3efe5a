"""Evaluate finished runs: ``python -m src.evaluate results_dir=<dir> run_ids='["a","b"]'``."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG_DIR = REPOSITORY / "config"


def main(arguments: Sequence[str]) -> int:
    """Parse, load, compare, write; print the results, then every path written."""
    # Processes that draw figures import this module, too, and should stay small.
    from fwlora.experiment.errors import user_errors_exit
    from fwlora.experiment.evaluation.claims import load_claims
    from fwlora.experiment.evaluation.drawing import available_cores
    from fwlora.experiment.evaluation.evaluate import collect_records, evaluate_records, write_files
    from fwlora.experiment.evaluation.report import ReportOrigin
    from fwlora.experiment.evaluation.request import USAGE, parse_request
    from fwlora.experiment.provenance import describe_environment, name_cpu
    from fwlora.experiment.wandb_store import load_records

    if any(argument in ("-h", "--help") for argument in arguments):
        print(USAGE)
        return 0
    with user_errors_exit():
        request = parse_request(arguments, os.environ, CONFIG_DIR / "config.yaml")
        claims = load_claims(CONFIG_DIR / "claims")
        load = partial(
            load_records,
            results_dir=request.results_dir,
            source=request.source,
            entity=request.entity,
            project=request.project,
        )
        records = collect_records(load, request.run_ids)
        command = shlex.join(["python", "-m", "src.evaluate", *arguments])
        made_by = ReportOrigin(command, describe_environment(REPOSITORY, name_cpu()))
        evaluation = evaluate_records(records, request.results_dir, claims, made_by, workers=available_cores())
        write_files(evaluation.files)
    print(evaluation.summary)
    for path in evaluation.files:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
