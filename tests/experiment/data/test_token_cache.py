from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fwlora.experiment.data.batching import TokenizedSplit
from fwlora.experiment.data.token_cache import cached_tokens

LABELS = np.array([1, 0])


def make_split(segments: bool = False) -> TokenizedSplit:
    tokens = np.array([5, 6, 7], dtype=np.int32)
    kinds = np.array([0, 1, 1], dtype=np.int8) if segments else None
    return TokenizedSplit(tokens, kinds, np.array([0, 1, 3]), LABELS, cut=1)


class Counted:
    """Tokenizes, and counts how often."""

    def __init__(self, split: TokenizedSplit) -> None:
        self.split, self.calls = split, 0

    def __call__(self) -> TokenizedSplit:
        self.calls += 1
        return self.split


def assert_same(got: TokenizedSplit, expected: TokenizedSplit) -> None:
    for name in ("tokens", "offsets", "labels", "segments"):
        one, other = getattr(got, name), getattr(expected, name)
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype


@pytest.mark.parametrize("segments", [False, True])
def test_tokens_are_made_once_per_key_and_read_as_memory_maps(tmp_path, segments):
    make = Counted(make_split(segments))
    for _ in range(3):
        got = cached_tokens(tmp_path / "new" / "folder", ["a", 1], LABELS, make)
        assert_same(got, make.split)
        assert isinstance(got.tokens, np.memmap)
    assert make.calls == 1
    cached_tokens(tmp_path / "new" / "folder", ["a", 2], LABELS, make)
    assert make.calls == 2
    assert not list((tmp_path / "new" / "folder").glob(".*"))


def test_without_a_key_nothing_is_kept(tmp_path):
    make = Counted(make_split())
    for _ in range(2):
        assert_same(cached_tokens(tmp_path, None, LABELS, make), make.split)
    assert make.calls == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "mixed"])
def test_damaged_files_are_made_again(tmp_path, damage):
    make = Counted(make_split())
    cached_tokens(tmp_path, ["a"], LABELS, make)
    (folder,) = tmp_path.iterdir()
    tokens = folder / "tokens.npy"
    if damage == "gone":
        tokens.unlink()
    elif damage == "mixed":
        np.save(folder / "offsets.npy", np.array([0, 1, 2]))
    else:
        tokens.write_bytes(tokens.read_bytes()[: 40 if damage == "cut" else 0])
    assert_same(cached_tokens(tmp_path, ["a"], LABELS, make), make.split)
    assert_same(cached_tokens(tmp_path, ["a"], LABELS, make), make.split)
    assert make.calls == 2


def test_no_damage_is_ever_read(tmp_path):
    """Every byte of every file, changed, cut or exchanged with another file's, makes the split anew."""
    make = Counted(make_split(segments=True))
    cached_tokens(tmp_path, ["a"], LABELS, make)
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [
        "checksum", "cut.npy", "offsets.npy", "segments.npy", "tokens.npy",
    ]  # fmt: skip
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    for path, content in whole.items():
        damages = [
            content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :] for place in range(len(content))
        ]
        for damage in [
            *damages,
            content[:-1],
            b"",
            content + b"x",
            *(whole[other] for other in whole if other != path),
        ]:
            path.write_bytes(damage)
            before = make.calls
            got = cached_tokens(tmp_path, ["a"], LABELS, make)
            assert_same(got, make.split)
            assert make.calls == before + 1 and got.cut == 1
            assert {path: path.read_bytes() for path in folder.iterdir()} == whole


def test_labels_are_those_of_the_split_and_never_the_caches(tmp_path):
    make = Counted(make_split())
    cached_tokens(tmp_path, ["a"], LABELS, make)
    got = cached_tokens(tmp_path, ["a"], 1 - LABELS, make)
    assert got.labels.tolist() == [0, 1] and make.calls == 1


def test_a_place_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    make = Counted(make_split())
    for _ in range(2):
        assert_same(cached_tokens(blocked / "tokens", ["a"], LABELS, make), make.split)
    assert make.calls == 2


def test_what_another_process_wrote_in_the_meantime_stays(tmp_path, monkeypatch):
    """A folder that others may be reading is never taken away from them."""
    first = Counted(make_split(segments=True))

    class Slow(Counted):
        def __call__(self) -> TokenizedSplit:
            cached_tokens(tmp_path, ["a"], LABELS, first)
            (folder,) = [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
            self.written = folder.stat().st_ino
            return super().__call__()

    slow = Slow(make_split(segments=True))
    assert_same(cached_tokens(tmp_path, ["a"], LABELS, slow), slow.split)
    (folder,) = tmp_path.iterdir()
    assert folder.stat().st_ino == slow.written and first.calls == 1


def test_without_its_file_of_segments_a_split_is_made_again(tmp_path):
    make = Counted(make_split(segments=True))
    cached_tokens(tmp_path, ["a"], LABELS, make)
    (folder,) = tmp_path.iterdir()
    (folder / "segments.npy").unlink()
    assert_same(cached_tokens(tmp_path, ["a"], LABELS, make), make.split)
    assert make.calls == 2
