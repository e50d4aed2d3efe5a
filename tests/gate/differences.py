"""Where two recorded documents differ."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any


def find_differences(expected: Any, found: Any, tolerance: float = 0.0, path: str = "") -> Iterator[str]:
    """Yield a line for each difference.

    Args:
        expected: a JSON value.
        found: the value compared with it.
        tolerance: relative and absolute, of floats; 0 compares every bit.
        path: of both values, for the lines.
    """
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in [*expected, *(key for key in found if key not in expected)]:
            where = f"{path}/{key}"
            if key not in found or key not in expected:
                yield f"{where}: {'missing' if key not in found else 'new'}"
            elif isinstance(expected[key], str) and isinstance(found[key], str) and key.endswith(".json"):
                documents = json.loads(expected[key]), json.loads(found[key])
                if tolerance or documents[0] != documents[1]:
                    yield from find_differences(*documents, tolerance, where)
                elif expected[key] != found[key]:
                    yield f"{where}: equal values in other bytes"
            else:
                yield from find_differences(expected[key], found[key], tolerance, where)
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for index, items in enumerate(zip(expected, found, strict=True)):
            yield from find_differences(*items, tolerance, f"{path}[{index}]")
    elif isinstance(expected, float) and isinstance(found, float):
        if not math.isclose(expected, found, rel_tol=tolerance, abs_tol=tolerance):
            yield f"{path}: {expected!r} became {found!r}"
    elif expected != found:
        yield f"{path}: {_shorten(expected)} became {_shorten(found)}"


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}… ({len(text)} characters)"
