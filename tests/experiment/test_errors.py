"""What ends a program: a mistake, an interrupt, a machine that has run out of something, and nothing else."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from fwlora.experiment.errors import UserError, explain_loader_error, user_errors_exit
from tests.helpers.paths import REPOSITORY


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


def chain(cause: Exception) -> Exception:
    try:
        try:
            raise cause
        except Exception:
            raise ValueError("the library gave up")  # noqa: B904
    except ValueError as error:
        return error


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOTDIR])
def test_a_cache_that_cannot_be_used_is_the_cause(number):
    told = explain_loader_error(chain(OSError(number, os.strerror(number), "/cache/token")))
    assert told.startswith(f"/cache/token cannot be used ({os.strerror(number)}); make the caches writable")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device", "/cache/x"), MemoryError()])
def test_an_exhausted_machine_is_no_fault_of_what_was_loaded(error):
    with pytest.raises(type(error)):
        explain_loader_error(chain(error))


@pytest.mark.parametrize(
    "error", [OSError("Couldn't connect"), FileNotFoundError(errno.ENOENT, "x", "y"), KeyError("x")]
)
def test_any_other_error_is_of_what_was_loaded(error):
    assert explain_loader_error(chain(error)) is None


def test_a_hub_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / ".cache").write_text("a file")
    environment = {**os.environ, "HF_HOME": "/dev/null/hub", "PYTHONPATH": str(REPOSITORY)}
    command = [
        sys.executable,
        "-m",
        "src.train",
        "run=proposed-minilm-L6--acceptability",
        "mode=trial",
        f"results_dir={tmp_path}",
    ]
    done = subprocess.run(
        [*command, "run.model.pretrained_id=an-id-of-the-hub"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "cannot be used (Not a directory)" in done.stderr, done.stderr
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
