"""What all settings share: strict typed nodes, common ranges, and which fields a search may vary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Self, get_args

from pydantic import BaseModel, ConfigDict, Field

from fwlora.experiment.json_types import JsonMapping, JsonObject


class SettingsNode(BaseModel):
    """A mapping in a run file: no unknown keys, no conversion of types, values that do not change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())

    @classmethod
    def from_record(cls, record: JsonMapping) -> Self:
        """Read recorded values without validation, so that runs of older programs can be read.

        Args:
            record: unknown keys are ignored; missing ones get their default, or None where there is none.

        Raises:
            AttributeError: a section that is not a mapping.
        """
        values: JsonObject = {}
        for name, field in cls.model_fields.items():
            value = record.get(name)
            section = _find_section(field.annotation)
            if section is not None and (value is not None or field.is_required()):
                value = section.from_record(value or {})
            elif value is None and not field.is_required():
                value = field.get_default(call_default_factory=True, validated_data={})
            values[name] = value
        return cls.model_construct(**values)


Fraction = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


@dataclass(frozen=True)
class Searchable:
    """Marks a field that a search may vary: ``rank: Annotated[int, Searchable("lora_rank")]``.

    Attributes:
        name: in ``optuna.search_space``; None for the field's own name.
    """

    name: str | None = None


def _find_section(annotation: Any) -> type[SettingsNode] | None:
    candidates = (annotation, *get_args(annotation))
    return next((each for each in candidates if isinstance(each, type) and issubclass(each, SettingsNode)), None)


def find_searchable(node: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield (name in the search space, path of the value) of every marked field of a node and of the nodes in it.

    Args:
        node: the class of the node.
        path: of the node itself.
    """
    for key, field in node.model_fields.items():
        for mark in field.metadata:
            if isinstance(mark, Searchable):
                yield mark.name or key, (*path, key)
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from find_searchable(inner, (*path, key))
