"""The ``fwlora`` command."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

MISSING_EXTRA = "the `fwlora` command needs the experiment extra ({name} is missing): pip install 'fwlora[experiment]'"


def make_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="fwlora", description="Experiments with Fisher-Weighted LoRA.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    study = commands.add_parser(
        "study", help="run every run of a study through src.main, then evaluate them (in a checkout)"
    )
    study.add_argument("name", help="a file of config/study, by its name, e.g. quickstart")
    study.add_argument("overrides", nargs="*", metavar="key=value", help="further arguments of every run")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = make_parser().parse_args(argv)
    try:
        from rich.console import Console

        from fwlora.experiment.command_line import user_errors_exit
        from fwlora.experiment.study import (
            find_repository,
            format_duration,
            load_study,
            plan_study,
            run_study,
        )
    except ModuleNotFoundError as error:
        print(MISSING_EXTRA.format(name=error.name), file=sys.stderr)
        return 2
    started = time.monotonic()
    console = Console()
    with user_errors_exit():
        repository = find_repository(Path.cwd())
        study = load_study(arguments.name, repository / "config")
        planned = plan_study(study, repository / "config", os.environ, arguments.overrides)
        console.print(
            f"study {arguments.name}: {len(planned)} runs, results in {planned[0].results_dir}", highlight=False
        )
        try:
            exit_code = run_study(planned, repository, console)
        except KeyboardInterrupt:
            console.print("interrupted")
            return 130
    if exit_code == 0:
        console.print(f"study {arguments.name} took {format_duration(time.monotonic() - started)}", highlight=False)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
