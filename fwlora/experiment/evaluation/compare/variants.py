"""What runs are compared as: roles, labels and styles from the registry of methods."""

from __future__ import annotations

from fwlora.experiment.methods import MethodSpec, Variant, find_method, known_methods
from fwlora.experiment.settings.schema import RunSettings

UNREGISTERED_ROLE = "other"
UNREGISTERED_STYLE = 4


def find_variant(run: RunSettings) -> Variant:
    """Return what a run is compared as; a method that is not registered is a baseline under its recorded name."""
    spec: MethodSpec | None = find_method(run.method)
    if spec is None:
        return Variant(UNREGISTERED_ROLE, run.method, "baseline", UNREGISTERED_STYLE)
    return spec.variant(run)


def known_variants() -> list[Variant]:
    """List everything that runs of registered methods are compared as."""
    return [variant for spec in known_methods().values() for variant in spec.variants]


def known_roles() -> dict[str, str]:
    """Return the label of every role that a claim can name."""
    return {**{variant.role: variant.label for variant in known_variants()}, UNREGISTERED_ROLE: UNREGISTERED_ROLE}


def label_role(role: str) -> str:
    """Return the label of a role; of an unknown one the role itself."""
    return known_roles().get(role, role)
