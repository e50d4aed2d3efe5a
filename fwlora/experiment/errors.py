"""The one exception that reaches a user as a message instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterable

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
