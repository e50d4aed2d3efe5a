"""The one exception that reaches a user as a message instead of a traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class UserError(ValueError):
    """A mistake in what the user asked for: what, where, the value, the remedy.

    Entry points print ``str(error)`` to stderr and exit with :data:`EXIT_USER_ERROR`.
    """

    @classmethod
    def collect(cls, heading: str, problems: Iterable[str]) -> UserError:
        """One error that lists every problem found, a line each."""
        lines = list(problems)
        if len(lines) == 1:
            return cls(f"{heading}: {lines[0]}")
        return cls("\n".join([f"{heading} ({len(lines)} problems):", *(f"  - {line}" for line in lines)]))


def describe_yaml_error(error: Exception) -> str:
    """One line: where a YAML file is wrong, and what is; of other errors the first line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or not problem:
        return str(error).splitlines()[0]
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


@contextmanager
def user_errors_exit() -> Iterator[None]:
    """Ends the process with the message and :data:`EXIT_USER_ERROR` where the block raises a :class:`UserError`.

    An interrupt ends it with 130, as shells do, and one word.
    """
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(EXIT_INTERRUPTED)
