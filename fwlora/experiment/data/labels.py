"""From a label column to classes 0, 1, ... and their names, or to numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MAX_CLASSES = 256
LARGEST_NUMBER = float(np.finfo(np.float32).max)
# GLUE's label of every example whose label is kept secret.
HIDDEN_LABEL = -1
SHOWN_NAMES = 10
HIDDEN = f"{HIDDEN_LABEL} marks the hidden labels of a GLUE test split"


@dataclass(frozen=True)
class LabelEncoder:
    """How the values of a label column become classes.

    Attributes:
        names: name of every class, in class order.
        classes: label value -> class.
        problem: why no classifier can be trained on these classes, or None.
    """

    names: tuple[str, ...]
    classes: Mapping[object, int]
    problem: str | None = None

    @classmethod
    def fit(cls, values: Sequence[object], declared: Sequence[str] | None = None) -> LabelEncoder:
        """Derive the classes from the labels of the training split.

        Args:
            values: the labels; None for a missing one.
            declared: names of the classes, where the data set states them; labels are then their indices. Otherwise
                integer labels are the classes, and strings are sorted.
        """
        present = [value for value in values if value is not None]
        names: tuple[str, ...]
        if declared:
            names = tuple(declared)
            return cls(names, _number(range(len(names))), _find_count_problem(len(names)))
        integers = [value for value in present if isinstance(value, int)]
        if present and len(integers) == len(present):
            count = max(0, min(max(integers), MAX_CLASSES) + 1)
            names = tuple(str(index) for index in range(count))
            found = f"labels up to {max(integers)}" if count > MAX_CLASSES else None
            return cls(names, _number(range(count)), _find_count_problem(count, found))
        strings = [value for value in present if isinstance(value, str)]
        if present and len(strings) == len(present):
            names = tuple(sorted(set(strings)))
            return cls(names, _number(names), _find_count_problem(len(names)))
        return cls((), {}, f"holds neither integers nor strings, but {present[:1]}; labels are classes")

    def find_unknown(self, values: Sequence[object]) -> list[tuple[int, object]]:
        """Return (row, label) of every label that is none of the classes."""
        return [(row, value) for row, value in enumerate(values) if not self._has(value)]

    def describe_unknown(self, values: Sequence[object]) -> str | None:
        """Describe the labels that are none of the classes; None where all are, or where there are no classes."""
        unknown = self.find_unknown(values)
        if not unknown or not self.classes:
            return None
        row, value = unknown[0]
        hidden = f"; {HIDDEN}" if value == HIDDEN_LABEL else ""
        return (
            f"{len(unknown)} labels outside the classes {', '.join(self.names[:SHOWN_NAMES])}, "
            f"first row {row}: {value!r}{hidden}"
        )

    def encode(self, values: Sequence[object]) -> np.ndarray:
        """Return the classes of labels that are all known, int64, shape (n,)."""
        return np.array([self.classes[value] for value in values], dtype=np.int64)

    def _has(self, value: object) -> bool:
        return isinstance(value, int | str) and value in self.classes


def describe_other_than_numbers(values: Sequence[object]) -> str | None:
    """Describe the labels that are no finite numbers, or hidden; None where a regression can learn from all of them."""
    bad = [row for row, value in enumerate(values) if not _is_finite_number(value)]
    if bad:
        return f"{len(bad)} labels are no finite numbers, first row {bad[0]}: {values[bad[0]]!r}"
    if values and all(value == HIDDEN_LABEL for value in values):
        return f"every label is {values[0]!r}; {HIDDEN}"
    return None


def encode_numbers(values: Sequence[object]) -> np.ndarray:
    """Return labels that are all finite numbers, float32, shape (n,)."""
    return np.array(values, dtype=np.float32)


def _is_finite_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_NUMBER


def _number(values: Iterable[object]) -> dict[object, int]:
    return {value: index for index, value in enumerate(values)}


def _find_count_problem(count: int, found: str | None = None) -> str | None:
    if 2 <= count <= MAX_CLASSES:
        return None
    return f"has {found or f'{count} classes'}; 2 to {MAX_CLASSES} classes can be learnt"
