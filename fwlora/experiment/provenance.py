"""What a run was made with: code, versions, hardware. Compared runs should agree in it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

RECORDED_PACKAGES = ("fwlora", "torch", "peft", "transformers", "datasets", "optuna", "wandb", "numpy", "scikit-learn")


def describe_environment(repository: Path, device: torch.device) -> dict[str, Any]:
    """Commit, versions and hardware as plain values."""
    return {
        "commit": _git(repository, "rev-parse", "HEAD"),
        "dirty": bool(_git(repository, "status", "--porcelain")),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in RECORDED_PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
    }


def fingerprint_weights(model: nn.Module, excluded: Sequence[str] = ()) -> str:
    """Hash of names and values of all parameters: whether two runs started from the same encoder.

    Args:
        excluded: modules to leave out, such as a head that starts at random.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if not any(name.startswith(f"{module}.") for module in excluded):
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


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


def _cpu_name() -> str:
    return str(torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or "unknown CPU")
