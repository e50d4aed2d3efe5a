"""Files are written whole or not at all, and read with every mistake in them."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from fwlora.experiment.errors import UserError
from fwlora.experiment.files import load_model, load_yaml, read_model, replace_folder, write_files
from fwlora.experiment.settings.base import SettingsNode


class Inner(SettingsNode):
    depth: int


class Outer(SettingsNode):
    name: str
    inner: Inner
    share: float = 0.5


def list_all(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_files_are_written_together_and_folders_are_made(tmp_path: Path):
    write_files({tmp_path / "a" / "x": b"1", tmp_path / "b" / "y": b"2"})
    write_files({tmp_path / "a" / "x": b"3"})
    assert list_all(tmp_path) == ["a", "a/x", "b", "b/y"]
    assert (tmp_path / "a" / "x").read_bytes() == b"3" and (tmp_path / "b" / "y").read_bytes() == b"2"


def test_one_file_that_cannot_be_written_leaves_all_as_they_were(tmp_path: Path):
    write_files({tmp_path / "x": b"old"})
    (tmp_path / "y").mkdir()
    with pytest.raises(OSError) as raised:
        write_files({tmp_path / "x": b"new", tmp_path / "y": b"new"})
    assert (raised.value.filename, raised.value.strerror) == (str(tmp_path / "y"), "Is a directory")
    assert list_all(tmp_path) == ["x", "y"] and (tmp_path / "x").read_bytes() == b"old"


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path):
    folder = tmp_path / "new" / "folder"
    replace_folder(folder, lambda partial: (partial / "one").write_text("1"))
    replace_folder(folder, lambda partial: (partial / "two").write_text("2"))
    assert list_all(tmp_path) == ["new", "new/folder", "new/folder/two"]

    def fail(partial: Path) -> None:
        (partial / "three").write_text("3")
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        replace_folder(folder, fail)
    assert list_all(tmp_path) == ["new", "new/folder", "new/folder/two"]
    assert oct(folder.stat().st_mode & 0o777) == oct(0o777 & ~current_umask())


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_two_at_once_do_not_share_what_is_half_written(tmp_path: Path):
    both = threading.Barrier(2)

    def fill(partial: Path) -> None:
        both.wait(10)
        (partial / "file").write_text("x" * 10)
        both.wait(10)

    threads = [threading.Thread(target=replace_folder, args=(tmp_path / str(place), fill)) for place in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list_all(tmp_path) == ["1", "1/file", "2", "2/file"]


def test_a_model_is_read_from_yaml(tmp_path: Path):
    path = tmp_path / "file.yaml"
    path.write_text("name: ${inner.depth} deep\ninner: {depth: 3}\nshare: 1e-1\n")
    assert read_model(path, Outer, "file") == Outer(name="3 deep", inner=Inner(depth=3), share=0.1)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("name: a\nname: b\n", ["cannot be read: line 2, column 1: found duplicate key name"]),
        ("name: [", ["cannot be read: line 1, column 8: "]),
        ("- 1\n- 2\n", ["is not a mapping of keys"]),
        ("name: ${nothing}\ninner: {depth: 1}\n", ["Interpolation key 'nothing' not found"]),
        (
            "nam: a\ninner: {depth: 1.5, heigth: 2}\n",
            [
                "name: missing",
                "inner.depth = 1.5: ",
                "inner.heigth: unknown key",
                "nam: unknown key; did you mean `name`?",
            ],
        ),
        ("", ["name: missing", "inner: missing"]),
        ("[" * 5000, ["cannot be read: nested too deeply"]),
    ],
)
def test_mistakes_in_a_file_are_named_together(tmp_path: Path, content: str, expected: list[str]):
    path = tmp_path / "file.yaml"
    path.write_text(content)
    model, problems = load_model(path, Outer)
    assert model is None and len(problems) == len(expected), problems
    assert all(part in problem for part, problem in zip(expected, problems, strict=True)), problems
    with pytest.raises(UserError, match=r"^config/file\.yaml"):
        read_model(path, Outer, "config/file.yaml")


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^cannot be read: No such file or directory$"):
        load_yaml(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"^cannot be read: "):
        load_yaml(tmp_path / "binary.yaml")
