"""The kernels of ``kernels.c``, compiled on the machine that runs them, and kept for its next process.

They need a compiler of GNU C and the OpenMP runtime that torch has loaded; where either is missing, the layers are
computed by torch's operations instead. For another processor they are compiled anew.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fwlora.experiment.paths import machine_cache
from fwlora.experiment.tracking.environment import name_cpu

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
COMPILERS = ("cc", "gcc", "clang")
COMPILATION_PATIENCE_S = 60.0
DEFINITIONS: dict[torch.dtype, tuple[str, ...]] = {torch.float32: (), torch.bfloat16: ("-DBFLOAT16",)}
# Columns that one vector operation takes, and what ranks are padded to; as in the source.
LANES, RANK_STEP = 16, 4
# Dropout probabilities are multiples of 2^-16.
THRESHOLD_STEPS = 2**16

_POINTER, _INTEGER, _FLOAT, _SEED = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_uint64
_THRESHOLD = ctypes.c_int32
_SIGNATURES: dict[str, str] = {
    "project": "ppp iiii i ptp",
    "expand": "pppp iiiii pt",
    "reduce": "ppp iiii i pt",
    "add_gradients": "pppp ii pt p ii",
    "add_norm": "pppp i stf pppf pppp ii",
    "norm_backward": "pppp i pt ppp stf pp ii",
    "gelu": "pppp i pp ii",
    "gelu_backward": "ppp i pt pp ii",
    "attend": "pppp pp stf pp iiiii",
    "attend_backward": "ppppp pp stf ppp iiiii",
    "drop": "p stf pp ii",
    "shrink": "pppp ppp i",
    "orthogonalize": "pppp pfp i",
}
_TYPES = {"p": _POINTER, "i": _INTEGER, "f": _FLOAT, "s": _SEED, "t": _THRESHOLD}

Argument = Tensor | int | float | None


class NoKernelsError(RuntimeError):
    """Kernels that cannot be compiled here; the message says why."""


class Kernels:
    """The compiled functions for one type of products; ``kernels.c`` says what each computes.

    Args:
        library: of :func:`load_kernels`.
        dtype: of the products.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._functions = {}
        for name, signature in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes = [*(_TYPES[letter] for letter in signature.replace(" ", "")), ctypes.c_int]
            function.restype = None
            self._functions[name] = function
        self._draw_kept = library.draw_kept
        self._draw_kept.argtypes = [_SEED, _THRESHOLD, _POINTER, _INTEGER, _INTEGER]
        self._draw_kept.restype = None

    def __call__(self, name: str, *arguments: Argument) -> None:
        """Call a function on all of torch's threads; tensors are contiguous, of the types of its declaration."""
        values = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
        self._functions[name](*values, torch.get_num_threads())

    def draw_kept(self, seed: int, probability: float, rows: int, columns: int) -> Tensor:
        """Return which elements of a site are kept, bool, shape (rows, columns)."""
        kept = torch.empty(rows, columns, dtype=torch.uint8)
        self._draw_kept(seed, drop_threshold(probability), kept.data_ptr(), rows, columns)
        return kept.bool()


def drop_threshold(probability: float) -> int:
    """Return the probability in steps of 2^-16, below 1."""
    return min(round(probability * THRESHOLD_STEPS), THRESHOLD_STEPS - 1)


def kept_scale(probability: float) -> float:
    """Return 1 / (1 - p) for the p that :func:`drop_threshold` rounds to."""
    return 1 / (1 - drop_threshold(probability) / THRESHOLD_STEPS)


@cache
def load_kernels(dtype: torch.dtype) -> Kernels:
    """Compile the kernels, or load what an earlier process compiled.

    Args:
        dtype: of the products.

    Raises:
        NoKernelsError: no kernels for the type, no compiler, no OpenMP runtime, or a compiler that fails.
    """
    if dtype not in DEFINITIONS:
        raise NoKernelsError(f"no kernels for {str(dtype).removeprefix('torch.')}")
    compiler, runtime = _find_compiler(), _find_openmp_runtime()
    command = [*compiler, *FLAGS, *DEFINITIONS[dtype]]
    path = _cached_path(command, runtime)
    with suppress(OSError):
        return Kernels(ctypes.CDLL(str(path)), dtype)
    with tempfile.TemporaryDirectory(prefix="fwlora-") as folder:
        built = Path(folder, path.name)
        _compile([*command, "-o", str(built), str(SOURCE), str(runtime)])
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Another name first: a process may be loading what another one is writing.
            partial = path.with_suffix(f".{os.getpid()}")
            shutil.copyfile(built, partial)
            partial.replace(path)
        try:
            return Kernels(ctypes.CDLL(str(built)), dtype)
        except OSError as error:
            raise NoKernelsError(f"{built.name} cannot be loaded: {error}") from None


def _find_compiler() -> Sequence[str]:
    given = shlex.split(os.environ.get("CC", ""))
    found = [given] if given and shutil.which(given[0]) else [[name] for name in COMPILERS if shutil.which(name)]
    if not found:
        raise NoKernelsError(f"no C compiler: neither CC nor {', '.join(COMPILERS)}")
    return found[0]


def _find_openmp_runtime() -> Path:
    """Return the runtime that torch has loaded: a second one would fight with it for the cores."""
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            path = line.partition("/")
            if re.search(r"/lib(gomp|iomp5|omp)[-.][^/]*$", line):
                return Path(path[1] + path[2])
    raise NoKernelsError("torch has loaded no OpenMP runtime that can be linked to")


def _cached_path(command: Sequence[str], runtime: Path) -> Path:
    """Return where the library is kept: everything that it depends on is part of its name."""
    capabilities = sorted(torch.cpu.get_capabilities().items())
    compiler = Path(shutil.which(command[0]) or command[0]).resolve()
    parts = [SOURCE.read_text(), command, str(compiler), runtime.name, name_cpu(), capabilities]
    return machine_cache() / "kernels" / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:24]}.so"


def _compile(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMPILATION_PATIENCE_S, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoKernelsError(f"{command[0]} does not compile them: {error}") from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or [f"exit code {done.returncode}"]
        raise NoKernelsError(f"{command[0]} does not compile them: {errors[0]}")
