"""A process that records half a run and waits to be killed: ``killed_run.py online|offline RESULTS RUN_ID 1,2,3``."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from tests.helpers.wandb_runs import TARGET, rows, start

KILLED_SCALE = 3.0
KILLED_CONFIG = {"run": {"attempt": "killed"}, "only_killed": 1}


def main(mode: str, results: str, run_id: str, steps: str) -> None:
    tracker = start(TARGET.model_copy(update={"mode": mode}), Path(results), run_id, config=KILLED_CONFIG)
    tracker.set_summary({"only_killed": 1})
    for row in rows([int(step) for step in steps.split(",")], KILLED_SCALE):
        tracker.log(row)
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
