"""Files: written whole or not at all, and YAML files read into checked models."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from fwlora.experiment.errors import UserError, describe_validation_error, describe_yaml_error

Model = TypeVar("Model", bound=BaseModel)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it, so that readers see the old content or the new.

    Raises:
        OSError: the folder cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a new folder beside ``folder`` and put it in its place, so that a failure leaves the old one.

    Args:
        folder: to be replaced or made.
        fill: writes the content into the folder that it is given.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fill(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def read_yaml(path: Path, model: type[Model], shown: str) -> Model:
    """Read a YAML file into a model.

    Args:
        path: the file.
        model: the pydantic class of its content.
        shown: the file's name in messages, such as ``config/study/quickstart.yaml``.

    Raises:
        UserError: a file that cannot be read or parsed, and every unknown key and refused value, all at once.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else describe_yaml_error(error)
        raise UserError(f"{shown} cannot be read: {reason}") from None
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise UserError.collect(shown, describe_validation_error(error, model)) from None
