"""Methods that a run can name: one file each, registered when `known_methods` first imports it.

A method of your own is a subclass of :class:`MethodSpec` and one call of :func:`register_method`.
"""

from fwlora.experiment.methods.base import (
    AdapterTable,
    Method,
    MethodSpec,
    Side,
    Variant,
    find_method,
    get_method,
    known_methods,
    method_nodes,
    register_method,
    unregister_method,
)

__all__ = [
    "AdapterTable",
    "Method",
    "MethodSpec",
    "Side",
    "Variant",
    "find_method",
    "get_method",
    "known_methods",
    "method_nodes",
    "register_method",
    "unregister_method",
]
