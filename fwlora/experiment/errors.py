"""The one exception that reaches a user as a message instead of a traceback."""

from __future__ import annotations

import difflib
import errno
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, get_args

from fwlora.experiment.stopping import StopRequested

if TYPE_CHECKING:
    from pydantic import ValidationError

_UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)
EXIT_USER_ERROR = 2
EXIT_EXHAUSTED = 1
EXIT_UNRECORDED = 74  # EX_IOERR of sysexits.h: the record of a run is not whole
EXIT_HELD = 75  # EX_TEMPFAIL: another process is at the run
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class UserError(ValueError):
    """A mistake in what the user asked for: what, where, the value, the remedy.

    Entry points print ``str(error)`` to stderr and exit with its exit code.

    Attributes:
        exit_code: :data:`EXIT_USER_ERROR`, unless a subclass has another.
    """

    exit_code: int = EXIT_USER_ERROR

    @classmethod
    def collect(cls, heading: str, problems: Iterable[str]) -> UserError:
        """Make one error that lists every problem, a line each."""
        lines = list(problems)
        if len(lines) == 1:
            return cls(f"{heading}: {lines[0]}")
        return cls("\n".join([f"{heading} ({len(lines)} problems):", *(f"  - {line}" for line in lines)]))


def describe_unwritable(folder: object, error: OSError) -> UserError:
    """Return the error of results that have no place."""
    return UserError(f"results_dir: {folder} cannot be written ({error.strerror}); choose another folder")


@contextmanager
def collecting(heading: str) -> Iterator[list[str]]:
    """Collect problems in a list and raise them all when the block ends.

    Args:
        heading: what the problems are about, such as a file's name.

    Raises:
        UserError: the list is not empty.
    """
    problems: list[str] = []
    yield problems
    if problems:
        raise UserError.collect(heading, problems)


def describe_validation_error(error: ValidationError, model: Any) -> list[str]:
    """Write a line for each mistake that pydantic found: key path, value, what is accepted.

    Args:
        error: of the validation.
        model: the class that was validated, whose fields are named where a key is unknown.
    """
    return [_describe_item(item, model) for item in error.errors()]


def _describe_item(item: Any, model: Any) -> str:
    # A discriminated union puts the chosen member's tag into the path; the file has no such key.
    parts, node = [], model
    for part in map(str, item["loc"]):
        if part != "[key]" and not _is_tag(part, node):
            parts.append(part)
        node = _child(node, part)
    path = ".".join(parts)
    kind, message = item["type"], item["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        known = _known_keys(parts[:-1], model)
        near = difflib.get_close_matches(parts[-1], known, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(known)}" if known else ""
        return f"{path}: unknown key" + (f"; {hint}" if hint else "")
    if kind == "missing":
        return f"{path}: missing"
    if kind == "union_tag_invalid":
        return (
            f"{path}.type = {item['ctx']['tag']!r}: choose one of {item['ctx']['expected_tags'].replace(chr(39), '')}"
        )
    if kind == "union_tag_not_found":
        return f"{path}.type: missing"
    if kind == "value_error":
        return f"{path}: {message}" if path else message
    return f"{path or 'content'} = {item['input']!r}: {message[0].lower()}{message[1:]}"


def _models_in(annotation: Any) -> list[Any]:
    """List the pydantic classes in an annotation, at any depth."""
    found = [annotation] if hasattr(annotation, "model_fields") else []
    return found + [model for inner in get_args(annotation) for model in _models_in(inner)]


def _child(node: Any, part: str) -> Any:
    field = node.model_fields.get(part) if hasattr(node, "model_fields") else None
    return node if field is None else field.annotation


def _is_tag(part: str, node: Any) -> bool:
    return any(part in get_args(model.model_fields["type"].annotation) for model in _tagged(node))


def _tagged(node: Any) -> list[Any]:
    return [model for model in _models_in(node) if "type" in model.model_fields]


def _known_keys(parents: Sequence[str], model: Any) -> list[str]:
    for part in parents:
        field = model.model_fields.get(part)
        models = [] if field is None else _models_in(field.annotation)
        if not models:
            return []
        model = models[0]
    return list(model.model_fields)


@contextmanager
def user_errors_exit() -> Iterator[None]:
    """End the process with the message and the error's exit code where the block raises a :class:`UserError`.

    A KeyboardInterrupt prints "interrupted" and exits with 130 (128 + SIGINT). A machine without memory or room on its
    disk is told in one line, with :data:`EXIT_EXHAUSTED`.
    """
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except (MemoryError, OSError, RuntimeError) as error:
        reason = _describe_exhaustion(error)
        if reason is None:
            raise
        print(f"error: {reason}", file=sys.stderr, flush=True)
        sys.exit(EXIT_EXHAUSTED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(EXIT_INTERRUPTED)
    except StopRequested as stop:
        print("interrupted" if stop.exit_code == EXIT_INTERRUPTED else stop, file=sys.stderr, flush=True)
        sys.exit(stop.exit_code)


def list_causes(error: BaseException) -> list[BaseException]:
    """List an error and what it was raised from or during, the last one first."""
    found: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in found:
        found.append(cause)
        cause = cause.__cause__ or cause.__context__
    return found


def explain_loader_error(error: Exception) -> str | None:
    """Return why a cache on this machine kept a library from loading what it was to load; None for another cause.

    Raises:
        OSError: there is no room left on the disk.
        MemoryError: there is no memory left.
    """
    for cause in list_causes(error):
        if isinstance(cause, (MemoryError, OSError)) and _describe_exhaustion(cause):
            raise cause
        if isinstance(cause, OSError) and cause.filename and cause.errno in _UNUSABLE:
            return (
                f"{cause.filename} cannot be used ({cause.strerror}); make the caches writable, or name others: "
                "HF_HOME for the Hub's, the working folder for .cache"
            )
    return None


def _describe_exhaustion(error: MemoryError | OSError | RuntimeError) -> str | None:
    """Describe an error by what the machine has run out of; None where it is another error."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" for {error.filename}" if error.filename else ""
        return f"there is no room left on the disk{where}; free some, or give another results_dir"
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return "there is no memory left; lower run.training.batch_size or run.dataset.max_length"
    text = str(error)
    if "out of memory" in text or "can't allocate memory" in text:
        return "there is no memory left on the device; lower run.training.batch_size or run.dataset.max_length"
    return None
