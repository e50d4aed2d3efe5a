"""Fetch pretrained models, with one message where one cannot be fetched."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import logging as transformers_logging

from fwlora.experiment.errors import UserError, explain_loader_error
from fwlora.experiment.paths import CACHE_DIR, expand_home, is_path

PACKAGE_PREFIX = "package:"
# The first that a folder has are its weights.
WEIGHT_FILES = ("*.safetensors*", "*.bin*")


def resolve_pretrained(pretrained_id: str, setting: str) -> str:
    """Return a folder or a Hub id; ``package:<module>/<folder>`` is a folder inside an installed Python package.

    Args:
        pretrained_id: a Hub id, a folder, or ``package:<module>/<folder>``.
        setting: that the user gave it by, for messages.

    Raises:
        UserError: there is no such folder, or the package is not installed.
    """
    if not pretrained_id.startswith(PACKAGE_PREFIX):
        folder = expand_home(pretrained_id)
        if folder.is_dir():
            return str(folder)
        if is_path(pretrained_id):
            raise UserError(f"{setting} = {pretrained_id!r}: there is no folder {folder}")
        return pretrained_id
    package, _, inside = pretrained_id.removeprefix(PACKAGE_PREFIX).partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.origin:
        raise UserError(
            f"{setting} = {pretrained_id!r}: the package {package!r} is not installed; "
            "run with `uv run --group quickstart`, or give a folder or a Hub id"
        )
    folder = Path(spec.origin).parent / inside
    if not (folder / "config.json").is_file():
        raise UserError(f"{setting} = {pretrained_id!r}: {folder} holds no config.json")
    return str(folder)


def find_weight_files(pretrained_id: str, revision: str | None) -> list[Path]:
    """List the files of a model that was loaded: in its folder, or in the cache of what the Hub gave.

    Args:
        pretrained_id: a Hub id, a folder, or ``package:<module>/<folder>``.
        revision: of a Hub id.
    """
    source = resolve_pretrained(pretrained_id, "run.model.pretrained_id")
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(source, revision=revision, cache_dir=CACHE_DIR, local_files_only=True))
    found = (sorted(folder.glob(pattern)) for pattern in WEIGHT_FILES)
    return next((files for files in found if files), [])


@contextmanager
def fetching(pretrained_id: str, setting: str) -> Iterator[None]:
    """Turn every error of a loader into one message, and keep its warnings off the terminal."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logger = logging.getLogger("huggingface_hub")
    hub_level = hub_logger.level
    hub_logger.setLevel(logging.ERROR)
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # loaders raise types of several libraries, safetensors' among them
        unusable = explain_loader_error(error)
        if unusable and not Path(pretrained_id).is_dir():
            raise UserError(f"{setting} = {pretrained_id!r} cannot be fetched: {unusable}") from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{setting} = {pretrained_id!r} cannot be fetched ({reason}); without the Hub give a folder that holds "
            f"config.json, the weights and the tokenizer: {setting}=/path/to/folder"
        ) from None
    finally:
        transformers_logging.set_verbosity(verbosity)
        hub_logger.setLevel(hub_level)


def fingerprint_weights(model: nn.Module, excluded: Sequence[str] = ()) -> str:
    """Hash names and values of all parameters, equal for runs that start from the same encoder.

    Args:
        model: whose parameters are hashed.
        excluded: modules to leave out, such as a head that starts at random.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if not any(name.startswith(f"{module}.") for module in excluded):
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
