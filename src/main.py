"""Run one experiment: launch ``src.train`` as a subprocess, keep its log, and exit with its exit code."""

from __future__ import annotations

from fwlora.experiment.interrupts import end_imports

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import hydra
from omegaconf import DictConfig

from fwlora.experiment.paths import CONFIG_DIR, find_log
from fwlora.experiment.pipeline_contract import complete_verdict, is_verdict
from fwlora.experiment.programs import command_of, start_program
from fwlora.experiment.resume.attempts import now_in_utc
from fwlora.experiment.resume.lock import RunLock, hold_run
from fwlora.experiment.settings.hydra_arguments import Invocation, enter_program, run_task
from fwlora.experiment.stopping import SIGNALS, watch_parent
from fwlora.experiment.streams import LastingLog, outlive_readers


def launch_training(
    invocation: Invocation, log_path: Path, environment: Mapping[str, str], lock: RunLock | None = None
) -> tuple[int, list[str]]:
    """Run ``src.train``, its output on this stdout and appended to the log.

    Requests to stop are passed on to the child, which takes those that a terminal sends to both for one. Neither a
    reader of stdout that goes away nor a log that cannot be written any more ends the run.

    Args:
        invocation: what the child is to do.
        log_path: of the log.
        environment: variables of this process by name.
        lock: of the run, which the child takes over.

    Returns:
        The child's exit code, or that of an incomplete record where only the log is not whole; and the lines of its
        verdict, in modes that have one, which are not printed yet.

    Raises:
        UserError: the log cannot be written.
    """
    verdict = []
    with LastingLog(log_path) as log:
        command = " ".join(command_of("src.train", invocation.overrides))
        log.write(f"# {now_in_utc()} {command}\n")
        variables = {**environment, **invocation.hand_over(), **(lock.for_child() if lock else {})}
        inherited = [lock.descriptor] if lock else []
        with start_program("src.train", invocation.overrides, variables, inherited=inherited) as child:
            taken = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            previous = {number: signal.signal(number, lambda sent, frame: child.send_signal(sent)) for number in taken}
            try:
                assert child.stdout is not None
                for line in child.stdout:
                    if is_verdict(line, invocation.settings.mode):
                        verdict.append(line.rstrip("\n"))
                        continue
                    print(line, end="", flush=True)
                    log.write(line)
            finally:
                child.wait()
                for number, handler in previous.items():
                    signal.signal(number, handler)
    return child.returncode or log.exit_code(), verdict


def run(invocation: Invocation) -> None:
    """Launch the training that was asked for, and end as it ends."""
    outlive_readers()
    watch_parent()
    settings = invocation.settings
    log_path = find_log(settings.results_dir, settings.run.run_id, settings.mode)
    with hold_run(settings) as lock:
        exit_code, verdict = launch_training(invocation, log_path, os.environ, lock)
    for line in complete_verdict(verdict, settings.mode):
        print(line, flush=True)
    # A child killed by signal n is reported by subprocess as -n, by shells as 128 + n.
    exit_code = 128 - exit_code if exit_code < 0 else exit_code
    if exit_code:
        sys.exit(exit_code)  # Hydra discards what its task returns


@hydra.main(config_path="../config", config_name="config", version_base="1.3")
def main(composed: DictConfig) -> None:
    """Hydra's task."""
    run_task(composed, run, CONFIG_DIR)


if __name__ == "__main__":
    end_imports()
    enter_program("src.main", main, run, CONFIG_DIR)
