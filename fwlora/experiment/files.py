"""Files: written whole or not at all, and YAML files read into checked models."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from yaml import Node, YAMLError

from fwlora.experiment.errors import UserError, describe_validation_error

MOST_VALUES = 100_000
_PARTIAL = ".partial"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
Model = TypeVar("Model", bound=BaseModel)


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write every file under a temporary name, then rename them all, so that an error leaves all files as they were.

    Folders are made as needed. A file that is renamed is on the disk, so that a crash leaves old content or new.

    Raises:
        OSError: a folder or file cannot be written; ``filename`` is that of the file.
    """
    temporaries = {path: name_partial(path) for path in files}
    path = Path()
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            _write_new(temporaries[path], content)
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        for temporary in temporaries.values():
            with suppress(OSError):
                temporary.unlink()


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a new folder beside ``folder`` and put it in its place, so that a failure or a crash leaves the old one.

    Args:
        folder: to be replaced or made.
        fill: writes the content into the folder that it is given.
    """
    partial = name_partial(folder)
    partial.mkdir(parents=True)
    try:
        fill(partial)
        sync_tree(partial)
        _put_in_place(partial, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def delete_folder(folder: Path) -> None:
    """Delete a folder at once for everybody who looks for it, then its content; what cannot be deleted is left."""
    doomed = name_partial(folder)
    with suppress(OSError):
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def name_partial(path: Path) -> Path:
    """Return a name beside a path for what is not complete yet; several processes may write at once."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{_PARTIAL}")


def remove_partials(folder: Path, older_than_s: float = 0.0) -> None:
    """Delete what processes that were killed left incomplete in a folder.

    Args:
        folder: that is cleaned; not the folders in it.
        older_than_s: where other processes may be writing, the age of what none of them can have begun.
    """
    for path in folder.glob(f".*{_PARTIAL}"):
        with suppress(OSError):
            if time.time() - path.lstat().st_mtime < older_than_s:
                continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def sync_tree(folder: Path) -> None:
    """Wait until a folder's files, which lie in it or in folders below, are on the disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            _sync(Path(place, name))
        sync_folder(Path(place))


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can do that."""
    with suppress(OSError):
        _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_new(path: Path, content: bytes) -> None:
    """Write a file that must not exist, not even as a link, through to the disk."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _put_in_place(new: Path, folder: Path) -> None:
    """Give a folder another's name, in one operation where the system has one; the old one is then at ``new``."""
    try:
        new.rename(folder)  # where there is none, or an empty one
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
    if not _exchange(new, folder):
        old = name_partial(folder)
        folder.rename(old)
        new.rename(folder)
        old.rename(new)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names by Linux's ``renameat2``; return whether that could be done."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
        done = library.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    except (OSError, AttributeError):
        return False
    return done == 0


def load_yaml(path: Path) -> Any:
    """Read a YAML file as an OmegaConf node.

    Raises:
        ValueError: it cannot be read or parsed, or is no mapping: a clause that says where and why.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        _check_yaml_size(path.read_text(encoding="utf-8"))
        node = OmegaConf.load(path)
    except RecursionError:
        raise ValueError("cannot be read: nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot be read: byte {error.start} is no UTF-8") from None
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"cannot be read: {_describe_yaml_error(error)}") from None
    if not OmegaConf.is_dict(node):
        raise ValueError("is not a mapping of keys")
    return node


def _check_yaml_size(text: str) -> None:
    """Refuse a text whose aliases refer to themselves, or stand for more values than settings ever have.

    Raises:
        ValueError: it is one of them.
        YAMLError: it is no YAML.
    """
    sizes: dict[int, int] = {}

    def count(node: Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = MOST_VALUES + 1  # while it is being counted: an alias of itself has no end
            children = [child for child in node.value if isinstance(child, Node | tuple)]
            flat = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
            sizes[id(node)] = 1 + sum(map(count, flat)) if not isinstance(node.value, str) else 1
        return sizes[id(node)]

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None and count(root) > MOST_VALUES:
        raise ValueError(f"holds more than {MOST_VALUES:,} values, or an alias of itself")


def load_model(path: Path, model: type[Model]) -> tuple[Model | None, list[str]]:
    """Read a YAML file into a model.

    Args:
        path: the file.
        model: the pydantic class of its content.

    Returns:
        The model, or None and a line for everything that is wrong.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return model.model_validate(OmegaConf.to_container(load_yaml(path), resolve=True)), []
    except ValidationError as error:
        return None, describe_validation_error(error, model)
    except OmegaConfBaseException as error:
        return None, [str(error).splitlines()[0]]
    except ValueError as error:
        return None, [str(error)]


def read_model(path: Path, model: type[Model], shown: str) -> Model:
    """Read a YAML file into a model.

    Args:
        path: the file.
        model: the pydantic class of its content.
        shown: the file's name in messages, such as ``config/study/quickstart.yaml``.

    Raises:
        UserError: a file that cannot be read or parsed, and every unknown key and refused value, all at once.
    """
    content, problems = load_model(path, model)
    if content is None:
        raise UserError.collect(shown, problems)
    return content


def _describe_yaml_error(error: Exception) -> str:
    """Say where a YAML file is wrong, and what is; of other errors the first line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is not None and problem:
        return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0]
