"""States written and read to the bit, and what has no form in a file."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fwlora.experiment.resume.encoding import load_state, save_state


def make_state() -> dict[str, Any]:
    joint = torch.arange(6.0)
    return {
        "plain": [None, True, 3, 10**20, 0.1, -0.0, float("inf"), "text\n\u00e9"],
        "by number": {0: {"step": torch.tensor(3.0)}, 1: (0.9, 0.999)},
        "parts of one memory": [joint[:4].view(2, 2), joint[4:]],
        "transposed": torch.arange(6).reshape(2, 3).T,
        "types": [torch.tensor([1, 255], dtype=torch.uint8), torch.tensor(True), torch.ones(2, dtype=torch.bfloat16)],
        "empty": [{}, [], (), torch.empty(0, 3)],
        "like a tensor": {"tensor": "0", "mapping": [], "tuple": 1},
    }


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and found.shape == expected.shape and torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert_same(found[name], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected
        if isinstance(expected, float):
            assert math.copysign(1, found) == math.copysign(1, expected)


def test_what_is_read_is_what_was_written(tmp_path):
    state = make_state()
    save_state(state, tmp_path / "state")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.json", "state.safetensors"]
    assert_same(load_state(tmp_path / "state"), state)


def test_a_state_is_a_copy(tmp_path):
    weight = torch.zeros(3)
    save_state({"weight": weight}, tmp_path / "state")
    weight += 1
    assert load_state(tmp_path / "state")["weight"].tolist() == [0, 0, 0]


def test_no_code_is_kept(tmp_path):
    for value in (print, object(), {1, 2}, slice(2)):
        with pytest.raises(TypeError, match=r"state\['a'\]\[1\] is a \w+, which a checkpoint has no form for"):
            save_state({"a": [0, value]}, tmp_path / "state")


@pytest.mark.parametrize("ending", [".json", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"[1", b'{"tensor": "7"}', b'{"module": 1}', b"\xff\x00", b"[" * 9_000])
def test_files_of_another_form_are_one_error(tmp_path, ending, content):
    save_state({"weight": torch.zeros(2)}, tmp_path / "state")
    (tmp_path / f"state{ending}").write_bytes(content)
    with pytest.raises(ValueError, match="state"):
        load_state(tmp_path / "state")
