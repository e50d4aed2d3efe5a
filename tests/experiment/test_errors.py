"""What ends a program: a mistake, an interrupt, a machine that has run out of something, and nothing else."""

from __future__ import annotations

import errno

import pytest

from fwlora.experiment.errors import UserError, user_errors_exit


@pytest.mark.parametrize(
    ("raised", "code", "told"),
    [
        (UserError("a: b"), 2, "error: a: b"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/full.log"),
            1,
            "no room left on the disk for /x/full.log",
        ),
        (MemoryError(), 1, "no memory left; lower run.training.batch_size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 1, "no memory left"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), 1, "no memory left on the device"),
    ],
)
def test_one_line_and_the_documented_code(raised, code, told, capsys):
    with pytest.raises(SystemExit) as ended, user_errors_exit():
        raise raised
    assert ended.value.code == code
    printed = capsys.readouterr().err
    assert told in printed and printed.count("\n") == 1


@pytest.mark.parametrize("raised", [RuntimeError("a bug"), OSError(errno.EACCES, "Permission denied"), KeyError("x")])
def test_a_defect_keeps_its_traceback(raised):
    with pytest.raises(type(raised)), user_errors_exit():
        raise raised
