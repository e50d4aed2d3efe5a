"""What a run was made with: code, versions, hardware. Compared runs should agree in it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from fwlora.experiment.json_types import JsonObject

RECORDED_PACKAGES = ("fwlora", "torch", "peft", "transformers", "datasets", "optuna", "wandb", "numpy", "scikit-learn")
# Pipelines commit results; code that made others is the same.
NO_RESULTS = ("--", ".", ":(exclude).research")


def describe_environment(repository: Path, device: str, threads: int | None = None) -> JsonObject:
    """Return commit, versions and hardware as plain values.

    Args:
        repository: a checkout.
        device: name of what computed.
        threads: it computed with.
    """
    return {
        "commit": _git(repository, "rev-parse", "HEAD"),
        "dirty": bool(_git(repository, "status", "--porcelain", "--untracked-files=no", *NO_RESULTS)),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in RECORDED_PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
        "threads": threads,
        "cpu_count": os.cpu_count(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(repository: Path, *arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", *arguments], cwd=repository, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def name_cpu() -> str:
    """Return the processor's name as its maker gives it, where the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or "unknown CPU"
