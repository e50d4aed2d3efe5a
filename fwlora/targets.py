"""Names of matrices as patterns of PEFT, each of which matches its own matrix and no other.

PEFT takes an entry of ``target_modules`` for the end of a path, and a key of ``rank_pattern`` for a regular expression
of such an end. A full path is therefore ambiguous where it is the end of another one, or holds a special character.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PLAIN = re.compile(r"[\w.-]*", re.ASCII)
SEPARATORS = re.compile(r"[^A-Za-z0-9]")


@dataclass(frozen=True)
class TargetPatterns:
    """How a LoraConfig names a set of matrices.

    Attributes:
        target_modules: their names, or one regular expression where a name alone is ambiguous.
        keys: name -> key of ``rank_pattern`` and ``alpha_pattern``.
    """

    target_modules: list[str] | str
    keys: Mapping[str, str]

    @classmethod
    def make(cls, names: Sequence[str], paths: Iterable[str]) -> TargetPatterns:
        """Make the patterns of ``names`` in a model whose modules have these ``paths``: plain names where those do."""
        if not _is_ambiguous(names, paths):
            return cls(list(names), {name: name for name in names})
        return cls("|".join(map(re.escape, names)), {name: f"^{re.escape(name)}" for name in names})


def find_key(patterns: Iterable[str], path: str) -> str | None:
    """Return the first key of a ``rank_pattern`` that PEFT finds for the module at ``path``; None where there is none.

    Source: ``peft.utils.other.get_pattern_key``.
    """
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", path)), None)


def describe_mismatch(config: Any, ranks: Mapping[str, int]) -> str | None:
    """Describe how attached ranks differ from a config's ``rank_pattern``; None where every key has its one matrix.

    Args:
        config: a LoraConfig whose ``rank_pattern`` names every matrix.
        ranks: rank of every matrix that carries the adapter, by path.
    """
    planned: dict[str, int] = dict(config.rank_pattern)
    found: dict[str, str] = {}
    for path, rank in ranks.items():
        key = find_key(planned, path)
        if key is None or key in found:
            return f"{path!r} carries an adapter of rank {rank} that was not planned"
        if planned[key] != rank:
            return f"{path!r} carries rank {rank} instead of {planned[key]}"
        found[key] = path
    missing = [key for key in planned if key not in found]
    return f"{missing[0]!r} carries no adapter" if missing else None


def _is_ambiguous(names: Sequence[str], paths: Iterable[str]) -> bool:
    """Return whether PEFT could take a name for another module's: by its end, or by a character it reads as any."""
    if not all(PLAIN.fullmatch(name) for name in names):
        return True
    own, wanted = set(names), {SEPARATORS.sub(".", name) for name in names}
    if len(wanted) < len(own):
        return True
    for path in paths:
        plain = SEPARATORS.sub(".", path)
        ends = [index + 1 for index, character in enumerate(plain) if character == "."]
        starts = ends if path in own else [0, *ends]
        if any(plain[start:] in wanted for start in starts):
            return True
    return False
