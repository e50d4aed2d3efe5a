"""The machine that the program runs on: its devices and its memory."""

from __future__ import annotations

import ctypes

import psutil
import torch

from fwlora.experiment.tracking.environment import name_cpu

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_INT = 2**31 - 1


class UnavailableDeviceError(RuntimeError):
    """A device that this machine does not have.

    Attributes:
        name: of the device.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name = name


def keep_freed_memory() -> bool:
    """Make the C library keep freed blocks for reuse instead of returning them to the system.

    A training step frees and allocates the same megabytes again and again; a page that was returned has to be mapped
    and cleared anew.

    Returns:
        Whether the C library has such a setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, 2**30) and mallopt(M_TRIM_THRESHOLD, LARGEST_INT))


def peak_memory_mib(device: torch.device) -> float:
    """Return the most memory in use so far, in MiB: allocated on the GPU, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    usage = psutil.Process().memory_info()
    if hasattr(usage, "peak_wset"):
        return usage.peak_wset / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if psutil.MACOS else 2**10)


def name_device(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else name_cpu()


def choose_device(name: str) -> torch.device:
    """Return the device of a name: ``cpu``, ``cuda``, or ``auto`` for a GPU where there is one.

    Raises:
        UnavailableDeviceError: ``cuda`` without a GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UnavailableDeviceError(name, "torch finds no GPU")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
