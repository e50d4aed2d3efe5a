"""Count what a layout is judged by: ``python -m benchmarks.structure [checkout ...]`` prints a row per checkout.

For each seam it counts the modules of the harness and of ``src`` that name something of its inside.
"""

from __future__ import annotations

import argparse
import ast
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
STARTS = 5
# What only the inside of a seam needs to name, in the old layout's words and in the new one's.
SEAMS = {
    "method": r"proposed_fw_lora|baseline_lora|['\"]adalora['\"]|FwLoraSettings|AdaLoraSettings",
    "tracker": r"wandb_store|tracking\.wandb|WandbTarget|WandbSettings|\bimport wandb\b",
    "measure": r"is_ratio|training_time['\"]|update_norm['\"]",
    "fused family": r"COVERED_MODELS|LINEAR_PATHS|NORM_PATHS|families import|Roberta|Electra",
    "GLUE task": r"['\"](cola|sst2|mrpc|stsb)['\"]",
    "launcher": r"src\.main['\"]",
    "optimizer": r"AdamW|get_scheduler",
}


def list_modules(checkout: Path) -> list[Path]:
    """The library, the harness and the program, without tests and benchmarks."""
    return sorted([*(checkout / "fwlora").rglob("*.py"), *(checkout / "src").glob("*.py")])


def list_functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method."""
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def count(checkout: Path) -> dict[str, int]:
    """Counts by name."""
    sources = {path: path.read_text(encoding="utf-8") for path in list_modules(checkout)}
    functions = [node for source in sources.values() for node in list_functions(ast.parse(source))]
    return {
        "modules": len(sources),
        "lines": sum(source.count("\n") for source in sources.values()),
        f"files over {MAX_FILE_LINES} lines": sum(source.count("\n") > MAX_FILE_LINES for source in sources.values()),
        "functions": len(functions),
        f"functions over {MAX_FUNCTION_LINES} lines": sum(
            (node.end_lineno or node.lineno) - node.lineno + 1 > MAX_FUNCTION_LINES for node in functions
        ),
        "Any": sum(
            isinstance(node, ast.Name) and node.id == "Any"
            for source in sources.values()
            for node in ast.walk(ast.parse(source))
        ),
        **{
            f"modules that name a {seam}": sum(bool(re.search(pattern, source)) for source in sources.values())
            for seam, pattern in SEAMS.items()
        },
    }


def time_help(checkout: Path) -> float:
    """Median seconds of ``fwlora --help`` with this checkout's code."""
    seconds = []
    for _ in range(STARTS):
        started = time.perf_counter()
        command = [sys.executable, "-m", "fwlora.experiment.cli", "--help"]
        subprocess.run(command, cwd=checkout, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main() -> None:
    """Print a table with a column per checkout."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.structure", description=__doc__)
    parser.add_argument("checkouts", nargs="*", type=Path, default=[Path.cwd()])
    checkouts = parser.parse_args().checkouts
    columns = [{**{k: str(v) for k, v in count(c).items()}, "--help [s]": f"{time_help(c):.2f}"} for c in checkouts]
    for name in columns[0]:
        print(f"{name:<32}" + "".join(f"{column[name]:>10}" for column in columns))


if __name__ == "__main__":
    main()
