"""What did this change move? ``python -m tests.gate.compare_commits <commit> [<commit>]``, to the last bit.

Each commit records its trainings and evaluation with its own code (``tests.gate.record``) in a worktree of its own, on
this machine and in this environment. Without a second commit the checkout as it stands is compared with the first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.gate.differences import find_differences
from tests.gate.record import FILES

REPOSITORY = Path(__file__).resolve().parents[2]
SHOWN = 40


def record_checkout(checkout: Path, folder: Path) -> None:
    """Record a checkout with its own code."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)}
    command = [sys.executable, "-m", "tests.gate.record", str(folder)]
    subprocess.run(command, cwd=checkout, env=environment, check=True)


def record_commit(commit: str, folder: Path) -> None:
    """Record a commit in a worktree that is removed afterwards."""
    checkout = folder.with_name(folder.name + "-checkout")
    git = ["git", "-C", str(REPOSITORY), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(checkout), commit], check=True)
    try:
        record_checkout(checkout, folder)
    finally:
        subprocess.run([*git, "remove", "--force", str(checkout)], check=True)


def main() -> int:
    """Compare and print; 0 where nothing moved, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.gate.compare_commits", description=__doc__)
    parser.add_argument("before", help="a commit")
    parser.add_argument("after", nargs="?", help="a commit; default: the checkout as it stands")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        before, after = Path(temporary) / "before", Path(temporary) / "after"
        record_commit(arguments.before, before)
        if arguments.after:
            record_commit(arguments.after, after)
        else:
            record_checkout(REPOSITORY, after)
        moved = [
            f"{name}{line}"
            for name in FILES
            for line in find_differences(*(json.loads((folder / name).read_text()) for folder in (before, after)))
        ]
    print("\n".join(moved[:SHOWN]))
    print(f"{len(moved)} differences" if moved else "nothing moved, to the last bit")
    return 1 if moved else 0


if __name__ == "__main__":
    sys.exit(main())
