"""How the report writes names and numbers."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from fwlora.experiment.evaluation.compare.cells import Group
from fwlora.experiment.evaluation.output import score_table, tables


def typeset(text: Any) -> str:
    """Write a true minus before numbers, curved apostrophes, and a space that does not break before ``%``."""
    signed = re.sub(r"(?<![\w.-])-(?=\d)", "−", str(text))
    return re.sub(r"(?<=\d) ?%", "\u00a0%", re.sub(r"(?<=\w)'(?=\w)", "’", signed))


def split_name(name: str) -> Markup:
    """Mark up a cell's name so that lines break between its parts only."""
    parts = [Markup('<span class="part">{}</span>').format(typeset(part)) for part in name.split(", ")]
    return Markup(", ").join(parts)


def format_points(value: float | None, signed: bool = False) -> str:
    """Write a fraction in points, a missing one as a dash."""
    return "–" if value is None else typeset(f"{100 * value:{'+' if signed else ''}.2f}")


def format_number(value: Any, pattern: str = "{:,.0f}") -> str:
    """Write a number by a format pattern, a missing one as a dash."""
    return "–" if value is None else typeset(pattern.format(value))


def format_p_value(value: float | None, name: str = "") -> str:
    """Write a p-value as ``0.412`` or ``< 0.001``; with a name as ``p = 0.412`` or ``p < 0.001``."""
    if value is None:
        return "–"
    text = tables.format_p_value(value).replace("<", "<\u00a0")
    return text if not name else f"{name}\u00a0{text}" if text.startswith("<") else f"{name}\u00a0=\u00a0{text}"


def sort_value(value: float | None) -> str:
    """Return the text by which a column is sorted, in full precision; missing values are empty and sort last."""
    return "" if value is None or not math.isfinite(value) else repr(float(value))


def mean_and_deviation(group: Group, metric: str, factor: float = 1.0, decimals: int = 2) -> str:
    """Write ``93.12 ± 0.35``, or the mean alone for one run.

    Args:
        group: of runs.
        metric: name of the value.
        factor: that the value is multiplied by.
        decimals: of both numbers.
    """
    text = score_table.format_mean(group, metric, factor, decimals)
    return "–" if text == score_table.NOTHING else typeset(text)


def name_anchors(prefix: str, names: Sequence[str]) -> dict[str, str]:
    """Make an id for each name that is valid in HTML and in addresses.

    Args:
        prefix: of all ids.
        names: in any characters.
    """
    anchors: dict[str, str] = {}
    for name in names:
        plain = f"{prefix}-" + re.sub(r"[^A-Za-z0-9._-]+", "-", name)
        candidates = itertools.chain([plain], (f"{plain}-{number}" for number in itertools.count(2)))
        anchors[name] = next(candidate for candidate in candidates if candidate not in anchors.values())
    return anchors


def count_noun(number: int, noun: str) -> str:
    """Write ``1 run`` or ``2 runs``."""
    return f"{number} {noun}" + ("" if number == 1 else "s")
