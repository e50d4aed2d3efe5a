"""A training's state as files: tensors in safetensors, everything else in JSON; nothing that runs code when read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

_TENSORS, _VALUES = ".safetensors", ".json"


def save_state(state: Any, path: Path) -> None:
    """Write a nest of mappings, lists, tuples, tensors and plain values, which :func:`load_state` reads to the bit.

    Args:
        state: to be written.
        path: of the two files, without their endings.

    Raises:
        TypeError: a value of another kind, with its place.
        OSError: a file that cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    values = _encode(state, "state", tensors)
    _add_ending(path, _TENSORS).write_bytes(save(tensors))
    _add_ending(path, _VALUES).write_text(json.dumps(values), encoding="utf-8")


def load_state(path: Path) -> Any:
    """Read what :func:`save_state` wrote; tensors are on the CPU.

    Raises:
        ValueError: files of another form.
        OSError: files that cannot be read.
    """
    try:
        tensors = load(_add_ending(path, _TENSORS).read_bytes())
        return _decode(json.loads(_add_ending(path, _VALUES).read_text(encoding="utf-8")), tensors)
    except (KeyError, TypeError, ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{path} holds no state: {error}") from None


def _add_ending(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _encode(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        name = str(len(tensors))
        # safetensors refuses tensors that share memory, as AdaLoRA's averages do.
        tensors[name] = value.detach().clone().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        pairs = [[_encode(k, place, tensors), _encode(v, f"{place}[{k!r}]", tensors)] for k, v in value.items()]
        return {"mapping": pairs}
    if isinstance(value, Sequence):
        items = [_encode(item, f"{place}[{index}]", tensors) for index, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    raise TypeError(f"{place} is a {type(value).__name__}, which a checkpoint has no form for")


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    if kind == "mapping":
        return {_decode(k, tensors): _decode(v, tensors) for k, v in content}
    raise ValueError(f"unknown kind {kind!r}")
