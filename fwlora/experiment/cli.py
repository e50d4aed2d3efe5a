"""The ``fwlora`` command."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

MISSING_EXTRA = "`fwlora {command}` needs the experiment extra ({name} is missing): pip install 'fwlora[experiment]'"


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command's arguments."""
    parser = argparse.ArgumentParser(prog="fwlora", description="Fisher-Weighted LoRA: rank plans and experiments.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    plan = commands.add_parser("plan", help="which matrix gets which rank within a parameter budget, before training")
    plan.add_argument("model", help="a folder with a config.json, a Hub id, or package:<module>/<folder>")
    plan.add_argument(
        "--budget", type=float, required=True, metavar="PERCENT", help="adapter parameters in per cent of the encoder's"
    )
    plan.add_argument(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        help="roles (query, key, value, intermediate, output) or ends of module paths; default: every role there is",
    )
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    study = commands.add_parser(
        "study", help="run every run of a study through src.main, then evaluate them (in a checkout)"
    )
    study.add_argument("name", help="a file of config/study, by its name, e.g. quickstart")
    study.add_argument("overrides", nargs="*", metavar="key=value", help="further arguments of every run")
    study.add_argument("--on", default="local", metavar="LAUNCHER", help="what starts the runs; default: local")
    commands.add_parser(
        "mirror-runs", help="make config/run, where pipelines list the run files, of config/runs (in a checkout)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    from fwlora.experiment.errors import user_errors_exit
    from fwlora.experiment.plugins import load_plugins

    arguments = make_parser().parse_args(argv)
    with user_errors_exit():
        load_plugins()
        try:
            return {"plan": _plan, "study": _study, "mirror-runs": _mirror_runs}[arguments.command](arguments)
        except ModuleNotFoundError as error:
            print(MISSING_EXTRA.format(command=arguments.command, name=error.name), file=sys.stderr)
    return 2


def _plan(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from fwlora.experiment.errors import user_errors_exit
    from fwlora.experiment.plan_command import as_json, plan_pretrained, rank_table, summary_lines

    with user_errors_exit():
        plan = plan_pretrained(arguments.model, arguments.budget, arguments.target_modules)
    if arguments.json:
        print(as_json(plan, arguments.model, arguments.budget))
        return 0
    table = rank_table(plan)
    # A table wider than the terminal is better than one with its ranks cut off.
    Console(width=Console(width=10_000).measure(table).maximum).print(table)
    print("\n".join(summary_lines(plan, arguments.budget)))
    return 0


def _study(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from fwlora.experiment.errors import user_errors_exit
    from fwlora.experiment.paths import find_repository
    from fwlora.experiment.stopping import Stopper
    from fwlora.experiment.study.display import format_duration
    from fwlora.experiment.study.execution import run_study
    from fwlora.experiment.study.spec import load_study, plan_study

    started = time.monotonic()
    console = Console()
    with user_errors_exit():
        repository = find_repository(Path.cwd())
        study = load_study(arguments.name, repository / "config")
        planned = plan_study(study, repository / "config", os.environ, arguments.overrides)
        folders = " and ".join(dict.fromkeys(run.results_dir for run in planned))
        console.print(f"study {arguments.name}: {len(planned)} runs, results in {folders}", highlight=False)
        # Its runs need up to ten seconds to stop.
        Stopper(patience_s=15.0).install()
        exit_code = run_study(planned, repository, console, arguments.on)
    if exit_code == 0:
        console.print(f"study {arguments.name} took {format_duration(time.monotonic() - started)}", highlight=False)
    return exit_code


def _mirror_runs(arguments: argparse.Namespace) -> int:
    from fwlora.experiment.paths import find_repository
    from fwlora.experiment.pipeline_contract import mirror_run_files

    repository = find_repository(Path.cwd())
    changed = mirror_run_files(repository / "config")
    print("\n".join(str(path.relative_to(repository)) for path in changed) or "config/run is as config/runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
