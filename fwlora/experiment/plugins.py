"""Packages that add methods, trackers and the like: each names a module under the entry point group `fwlora`.

In the package's ``pyproject.toml``::

    [project.entry-points.fwlora]
    my_methods = "my_package.methods"

Importing the module registers what it holds.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from fwlora.experiment.errors import UserError

GROUP = "fwlora"


@cache
def load_plugins() -> tuple[str, ...]:
    """Import every installed plugin, once per process.

    Returns:
        The modules that were imported.

    Raises:
        UserError: plugins that cannot be imported, all of them named.
    """
    loaded, problems = [], []
    for point in entry_points(group=GROUP):
        try:
            point.load()
            loaded.append(point.value)
        except Exception as error:  # a plugin may fail in any way, and none of them is a fault of the run
            package = point.dist.name if point.dist else "an unknown package"
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            problems.append(f"{point.name} = {point.value!r} of {package} ({reason}); repair or uninstall it")
    if problems:
        raise UserError.collect("plugins that cannot be imported", problems)
    return tuple(loaded)
