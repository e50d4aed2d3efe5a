"""From a label column to classes 0, 1, ... and their names, or to numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from reprlib import repr as shorten

import numpy as np

MAX_CLASSES = 256
LARGEST_NUMBER = float(np.finfo(np.float32).max)
# GLUE's label of every example whose label is kept secret.
HIDDEN_LABEL = -1
SHOWN_NAMES = 10
HIDDEN = f"{HIDDEN_LABEL} marks the hidden labels of a GLUE test split"
AS_NUMBERS = "set run.dataset.metric to pearson_correlation or spearman_correlation to predict numbers"
WHOLE_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,17})")
NUMBER = re.compile(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?\s*", re.ASCII)
# A label as classes are told apart by it: an integer, or a text.
Label = int | str


def normalize_label(value: object, class_names: Sequence[str] = ()) -> Label | None:
    """Return the label that a value of a table stands for; None where it is no label.

    An integer is the same label whether it was read as a number or as text. Where the source names its classes, an
    index becomes its name.

    Args:
        value: of a label column.
        class_names: names that 0, 1, ... stand for, where the source states them.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str):
        return int(value) if WHOLE_NUMBER.fullmatch(value) and not class_names else value
    if isinstance(value, bool):
        return str(value)
    if not isinstance(value, int):
        return None
    return class_names[value] if 0 <= value < len(class_names) else value


@dataclass(frozen=True)
class LabelEncoder:
    """How labels become classes: those present in the training split, in order.

    Attributes:
        labels: the label of every class, in class order.
        names: name of every class, in class order.
        problem: why no classifier can be trained on these classes, or None.
        remark: what a reader may not expect of these classes, or None.
    """

    labels: tuple[Label, ...]
    names: tuple[str, ...]
    problem: str | None = None
    remark: str | None = None

    @classmethod
    def fit(
        cls, values: Sequence[object], class_names: Sequence[str] = (), chosen_names: Sequence[str] | None = None
    ) -> LabelEncoder:
        """Derive the classes from the labels of the training split.

        Args:
            values: the labels; None for a missing one.
            class_names: names of the classes, where the data set states them; values are then their indices.
            chosen_names: ``run.dataset.label_names``: names of integer classes in ascending order, or text classes in
                the order of their numbers.
        """
        present = {label for label in (normalize_label(value, class_names) for value in values) if label is not None}
        if not present:
            advice = f"; {AS_NUMBERS}" if values and describe_other_than_numbers(values) is None else ""
            return cls(
                (), (), f"holds neither integers nor text, but {shorten(list(values[:1]))}; labels are classes{advice}"
            )
        if len({type(label) for label in present}) > 1:
            if class_names:
                stray = sorted(label for label in present if isinstance(label, int))
                hidden = f"; {HIDDEN}" if HIDDEN_LABEL in stray else ""
                return cls((), (), f"holds {stray[0]}, which is none of its classes {_join(class_names)}{hidden}")
            advice = AS_NUMBERS if describe_other_than_numbers(values) is None else "use one of them"
            return cls((), (), f"mixes integers and text, such as {_join(_examples(present))}; {advice}")
        if class_names and all(isinstance(label, str) for label in present):
            ordered: list[Label] = [name for name in dict.fromkeys(class_names) if name in present]
        else:
            ordered = sorted(present)
        if not 2 <= len(ordered) <= MAX_CLASSES:
            hidden = f"; {HIDDEN}" if ordered == [HIDDEN_LABEL] else ""
            shown = f" ({ordered[0]})" if len(ordered) == 1 else ""
            count = f"{len(ordered)} class{'es' if len(ordered) > 1 else ''}{shown}"
            return cls((), (), f"has {count}; 2 to {MAX_CLASSES} classes can be learnt{hidden}")
        names = tuple(str(label) for label in ordered)
        if chosen_names is None:
            return cls(tuple(ordered), names, remark=_describe_unusual(ordered, class_names))
        if isinstance(ordered[0], int) and len(chosen_names) == len(ordered):
            return cls(tuple(ordered), tuple(chosen_names))
        if sorted(chosen_names) == sorted(names):
            return cls(tuple(chosen_names), tuple(chosen_names))
        return cls((), (), f"has the classes {_join(names)}, and run.dataset.label_names names {_join(chosen_names)}")

    def find_unknown(self, values: Sequence[object], class_names: Sequence[str] = ()) -> list[tuple[int, object]]:
        """Return (row, label) of every label that is none of the classes."""
        known = set(self.labels)
        return [(row, value) for row, value in enumerate(values) if normalize_label(value, class_names) not in known]

    def describe_unknown(self, values: Sequence[object], class_names: Sequence[str] = ()) -> str | None:
        """Describe the labels that are none of the classes; None where all are, or where there are no classes."""
        unknown = self.find_unknown(values, class_names)
        if not unknown or not self.labels:
            return None
        row, value = unknown[0]
        label = normalize_label(value, class_names)
        hidden = f"; {HIDDEN}" if label == HIDDEN_LABEL else ""
        if label is not None and type(label) is not type(self.labels[0]):
            hidden = "; integers and names cannot be matched: let both splits hold the same kind"
        return (
            f"{len(unknown)} labels outside the classes {_join(self.names)}, first row {row}: "
            f"{shorten(value if label is None else label)}{hidden}"
        )

    def encode(self, values: Sequence[object], class_names: Sequence[str] = ()) -> np.ndarray:
        """Return the classes of labels that are all known, int64, shape (n,)."""
        places = {label: place for place, label in enumerate(self.labels)}
        encoded = (normalize_label(value, class_names) for value in values)
        return np.array([places[label] for label in encoded if label is not None], dtype=np.int64)


def describe_other_than_numbers(values: Sequence[object]) -> str | None:
    """Describe the labels that are no finite numbers, or hidden; None where a regression can learn from all of them."""
    numbers = [_as_number(value) for value in values]
    bad = [row for row, number in enumerate(numbers) if number is None]
    if bad:
        return f"{len(bad)} labels are no finite numbers, first row {bad[0]}: {shorten(values[bad[0]])}"
    if values and all(number == HIDDEN_LABEL for number in numbers):
        return f"every label is {shorten(values[0])}; {HIDDEN}"
    return None


def encode_numbers(values: Sequence[object]) -> np.ndarray:
    """Return labels that are all finite numbers, float32, shape (n,)."""
    return np.array([_as_number(value) for value in values], dtype=np.float32)


def _as_number(value: object) -> float | None:
    """Return a finite number within float32, also one that was read as text; None for anything else."""
    if isinstance(value, str) and NUMBER.fullmatch(value):
        value = float(value)
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= LARGEST_NUMBER:
        return None
    return float(value)


def _describe_unusual(labels: Sequence[Label], class_names: Sequence[str]) -> str | None:
    """Describe what a reader may not expect of classes.

    They are integers other than 0, 1, ...; named by the source and without an example; decimal numbers; or differ
    in nothing but case and the space around them.
    """
    absent = [name for name in class_names if name not in labels]
    if absent and isinstance(labels[0], str):
        return f"has no example of the class {absent[0]!r}, which the data set names"
    if isinstance(labels[0], int) and list(labels) != list(range(len(labels))):
        return f"holds the integers {_join(labels)}: class 0 is {labels[0]}, class 1 is {labels[1]}, and so on"
    numbers = [_as_number(label) for label in labels]
    if None not in numbers and not all(number.is_integer() for number in numbers if number is not None):
        return f"holds the numbers {_join(labels)}, read as {len(labels)} classes; {AS_NUMBERS}"
    alike = [list(group) for _, group in groupby(sorted(labels, key=_fold), key=_fold)]
    pair = next((group for group in alike if len(group) > 1), None)
    if pair:
        return f"holds the classes {pair[0]!r} and {pair[1]!r}, which differ in case or in spaces alone"
    return None


def _fold(label: Label) -> str:
    return str(label).strip().casefold()


def _examples(labels: set[Label]) -> list[str]:
    return [repr(min(label for label in labels if isinstance(label, kind))) for kind in (int, str)]


def _join(names: Sequence[object]) -> str:
    return ", ".join(str(name) for name in names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")
