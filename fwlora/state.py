"""Check that a saved state is complete and fits the object that loads it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fwlora.adapters import AdapterPair
from fwlora.options import FisherWeighting

STATE_FORMAT = 1
STATE_KEYS = (
    "options", "names", "shapes", "initial_ranks", "ranks", "steps", "fisher", "measured", "skipped", "importance"
)  # fmt: skip


def match_state(state: Mapping[str, Any], options: FisherWeighting, pairs: Sequence[AdapterPair]) -> list[int]:
    """Return the index in a state's lists of each matrix, in the order of ``pairs``.

    Args:
        state: what :meth:`fwlora.FisherWeightedLora.state_dict` returned, with all matrices of its model.
        options: of the object that loads it; all but ``strength`` have to agree.
        pairs: the matrices of the object, with the state's initial or present ranks.

    Raises:
        ValueError: not a state, a damaged one, or one of other options or of another model.
    """
    if not isinstance(state, Mapping) or state.get("format") != STATE_FORMAT:
        found = state.get("format") if isinstance(state, Mapping) else f"a {type(state).__name__}"
        raise ValueError(
            f"`state` is not a state of FisherWeightedLora in format {STATE_FORMAT} (found: {found}); pass what "
            "state_dict() returned"
        )
    wrong = _find_wrong_entries(state)
    if wrong:
        raise ValueError(f"`state` is damaged: {'; '.join(wrong)}; pass what state_dict() returned, unchanged")
    own, given = asdict(options), dict(state["options"])
    differing = [name for name in own if name != "strength" and own[name] != given.get(name)]
    if differing:
        told = ", ".join(f"{name} {given.get(name)!r} instead of {own[name]!r}" for name in differing)
        raise ValueError(f"`state` was taken with other options: {told}; build the object with the state's options")
    here = [(pair.name, [pair.B.shape[0], pair.A.shape[1]]) for pair in pairs]
    ranks_here = [pair.rank for pair in pairs]
    all_places = list(range(len(state["names"])))
    for places in (all_places, [place for place in all_places if state["ranks"][place] > 0]):
        there = [(state["names"][place], list(state["shapes"][place])) for place in places]
        fitting = ([state[kind][place] for place in places] for kind in ("ranks", "initial_ranks"))
        if there == here and ranks_here in fitting:
            return places
    raise ValueError(
        f"`state` belongs to another model: {_first_difference(state, pairs)}; load it into the model it was "
        "taken from, with the same target modules and ranks"
    )


def _find_wrong_entries(state: Mapping[str, Any]) -> list[str]:
    """Describe the entries of a state that state_dict() cannot have written."""

    def is_list(name: str, allowed: Callable[[Any], bool]) -> bool:
        values = state[name]
        return isinstance(values, list) and len(values) == len(state["names"]) and all(map(allowed, values))

    missing = [name for name in STATE_KEYS if name not in state]
    if missing:
        return [f"{', '.join(missing)} missing"]
    if not (isinstance(state["names"], list) and all(isinstance(name, str) for name in state["names"])):
        return ["names is no list of names"]
    if not isinstance(state["options"], Mapping):
        return ["options is no mapping"]
    counts = [name for name in ("steps", "measured", "skipped") if not _is_whole(state[name])]
    lists = [name for name in ("ranks", "initial_ranks") if not is_list(name, _is_whole)]
    if not is_list("shapes", lambda shape: isinstance(shape, list) and len(shape) == 2 and all(map(_is_whole, shape))):
        lists.append("shapes")
    if not is_list("fisher", lambda value: isinstance(value, float) and 0 <= value < math.inf):
        lists.append("fisher")
    if counts or lists:
        return [f"{name} is {state[name]!r}" for name in counts + lists]
    frozen = state["importance"] is not None
    if frozen and not is_list("importance", lambda value: isinstance(value, float) and 0 <= value <= 1):
        return [f"importance is {state['importance']!r}"]
    tried = state["measured"] + state["skipped"] > 0
    nothing_to_freeze = not frozen and tried and not any(state["fisher"])
    if frozen != (state["steps"] >= state["options"].get("warmup_steps", 0)) and not nothing_to_freeze:
        return [f"importance is {'there' if frozen else 'missing'} after {state['steps']} steps"]
    return [] if any(state["ranks"]) else ["ranks are all 0"]


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _first_difference(state: Mapping[str, Any], pairs: Sequence[AdapterPair]) -> str:
    """Describe the first difference between the state's matrices and the model's."""
    there = dict(zip(state["names"], zip(state["shapes"], state["ranks"], strict=True), strict=True))
    for pair in pairs:
        if pair.name not in there:
            return f"it has no matrix {pair.name!r}"
        (shape, rank), own = there[pair.name], [pair.B.shape[0], pair.A.shape[1]]
        if list(shape) != own:
            return f"{pair.name!r} has shape {tuple(shape)} there and {tuple(own)} here"
        if rank != pair.rank:
            return f"{pair.name!r} has rank {rank} there and {pair.rank} here"
    more = [name for name in there if name not in {pair.name for pair in pairs}]
    return f"it has {more[0]!r} as well" if more else "its matrices come in another order"
