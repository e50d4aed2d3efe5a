"""Start two processes as users do; torchrun binds a free port itself."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.helpers.paths import REPOSITORY


def torchrun(*arguments: str) -> str:
    """Run ``torchrun --nproc-per-node 2`` in this checkout; it has to end well. Return what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env=environment, cwd=REPOSITORY, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
