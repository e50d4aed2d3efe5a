from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint

import pytest

from fwlora.experiment import plugins
from fwlora.experiment.errors import UserError


@pytest.fixture
def installed(monkeypatch) -> Iterator[list[EntryPoint]]:
    points: list[EntryPoint] = []
    monkeypatch.setattr(plugins, "entry_points", lambda group: points if group == "fwlora" else [])
    plugins.load_plugins.cache_clear()
    yield points
    plugins.load_plugins.cache_clear()


def test_every_plugin_is_imported_once(installed):
    installed += [EntryPoint("a", "json", "fwlora"), EntryPoint("b", "math", "fwlora")]
    assert plugins.load_plugins() == ("json", "math")
    installed.clear()
    assert plugins.load_plugins() == ("json", "math")


def test_all_plugins_that_cannot_be_imported_are_named_at_once(installed):
    installed += [
        EntryPoint("a", "fwlora_missing_one", "fwlora"),
        EntryPoint("b", "json", "fwlora"),
        EntryPoint("c", "json:nothing", "fwlora"),
    ]
    with pytest.raises(UserError) as raised:
        plugins.load_plugins()
    lines = str(raised.value).splitlines()
    assert lines[0] == "plugins that cannot be imported (2 problems):"
    assert "a = 'fwlora_missing_one' of an unknown package (No module named" in lines[1]
    assert "c = 'json:nothing' of an unknown package (module 'json' has no attribute 'nothing')" in lines[2]
    assert all(line.endswith("; repair or uninstall it") for line in lines[1:])
