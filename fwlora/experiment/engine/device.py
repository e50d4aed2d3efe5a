"""The machine that the program runs on: its devices, what they compute fast in, and its memory."""

from __future__ import annotations

import ctypes

import psutil
import torch

from fwlora.experiment.errors import UserError
from fwlora.experiment.tracking.environment import name_cpu

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Has the C library keep freed blocks for reuse instead of handing them back; whether it could be told.

    A training step frees and takes the same megabytes again and again; handed back, each page has to be mapped and
    cleared anew.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, 2**30) and mallopt(M_TRIM_THRESHOLD, LARGEST_INT))


def peak_memory_mib(device: torch.device) -> float:
    """Most memory in use so far, in MiB: allocated on the GPU, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    usage = psutil.Process().memory_info()
    if hasattr(usage, "peak_wset"):
        return usage.peak_wset / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if psutil.MACOS else 2**10)


def name_device(device: torch.device) -> str:
    """The name of the GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else name_cpu()


def choose_device(wanted: str) -> torch.device:
    """The device that ``engine.device`` names.

    Raises:
        UserError: a GPU was asked for and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("engine.device is cuda, but torch sees no GPU; use engine.device=cpu or auto")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def choose_precision(wanted: str, device: torch.device) -> tuple[str, str | None]:
    """The precision to compute in, and a line to say where it is not the one wanted.

    bf16 is used where the hardware multiplies it faster than float32. A CPU does with matrix tiles (AMX) alone: with
    AVX-512's bf16 instructions torch's products take 1.7 to 1.9 times float32's time (benchmarks/README.md), and
    without them longer still.
    """
    if wanted != "bf16":
        return "fp32", None
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = bool(torch.cpu.get_capabilities().get("amx_bf16"))
    if native:
        return "bf16", None
    return "fp32", f"this {device.type} has no fast bf16: computing in float32"
