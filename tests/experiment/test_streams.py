"""A reader that goes away changes neither what a program does nor how it ends."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.helpers.paths import REPOSITORY

CODE = """
import logging, pathlib, sys
from fwlora.experiment.streams import outlive_readers
outlive_readers()
outlive_readers()
logging.basicConfig(stream=sys.stdout, level=logging.INFO)
for number in range(20_000):
    print("line", number, flush=True)
    logging.info("logged %d", number)
print("error", file=sys.stderr)
pathlib.Path(sys.argv[1]).write_text(str(number))
sys.exit(7)
"""


def test_a_program_goes_on_without_its_reader_and_ends_as_it_would(tmp_path):
    command = [sys.executable, "-c", CODE, str(tmp_path / "done")]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "line 0\n"
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 7 and errors == "error\n"
    assert (tmp_path / "done").read_text() == "19999"


def test_what_the_terminal_cannot_show_is_spelled(tmp_path):
    code = "from fwlora.experiment.streams import outlive_readers; outlive_readers(); print('\u00fc'); print(1)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "\\xfc\n1\n")
