"""Output that outlives its readers and its disk: neither is a reason for a run to stop."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from fwlora.experiment.errors import EXIT_UNRECORDED, describe_unwritable


class LastingStream:
    """A text stream that drops what it is given once nobody can read it.

    Args:
        stream: that is written to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or drop."""
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            return self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError):
            self._drop()
            return len(text)

    def flush(self) -> None:
        """Flush, or drop what is not written yet."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._drop()

    def _drop(self) -> None:
        """Let the descriptor lead nowhere, so that the interpreter's last flush does not fail either."""
        with suppress(OSError, ValueError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())
            os.close(nothing)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_readers() -> None:
    """Make stdout and stderr of this process :class:`LastingStream`."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, LastingStream):
            setattr(sys, name, LastingStream(stream))


class LastingLog:
    """A log file that lines are appended to; once that fails it drops them, and says so at the end.

    Args:
        path: of the file; folders are made.

    Raises:
        UserError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._error: OSError | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise describe_unwritable(path.parent, error) from None

    def write(self, line: str) -> None:
        """Append a line, or drop it."""
        if self._error is None:
            try:
                self._file.write(line.encode(errors="replace"))
            except OSError as error:
                self._error = error

    def exit_code(self) -> int:
        """Return 0 where the log is whole; otherwise say why it is not, and return :data:`EXIT_UNRECORDED`."""
        if self._error is None and not self._path.exists():
            self._error = FileNotFoundError(None, "it was removed")
        if self._error is None:
            return 0
        print(f"error: the log {self._path} is not whole: {self._error.strerror}", file=sys.stderr, flush=True)
        return EXIT_UNRECORDED

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._file.close()
