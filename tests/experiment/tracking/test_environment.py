from __future__ import annotations

import subprocess
from pathlib import Path

import torch

import fwlora
from fwlora.experiment.tracking.environment import RECORDED_PACKAGES, describe_environment, name_cpu

IDENTITY = ["-c", "user.name=a", "-c", "user.email=a@b"]


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_checkout_is_described_by_its_commit_and_whether_it_was_changed(tmp_path: Path):
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", ".")
    git(tmp_path, *IDENTITY, "commit", "-qm", "first")
    described = describe_environment(tmp_path, "cpu", threads=3)
    assert (described["commit"], described["dirty"]) == (git(tmp_path, "rev-parse", "HEAD"), False)
    assert (described["device"], described["threads"]) == ("cpu", 3)
    assert tuple(described["packages"]) == RECORDED_PACKAGES
    assert torch.__version__.startswith(described["packages"]["torch"].partition("+")[0])
    assert described["packages"]["fwlora"] == fwlora.__version__
    results = tmp_path / ".research" / "results"
    results.mkdir(parents=True)
    (results / "metrics.json").write_text("{}")
    git(tmp_path, "add", ".")
    git(tmp_path, *IDENTITY, "commit", "-qm", "results")
    (results / "metrics.json").unlink()
    assert describe_environment(tmp_path, "cpu")["dirty"] is False, "results are no code"
    (tmp_path / "file").write_text("two")
    assert describe_environment(tmp_path, "cpu")["dirty"] is True


def test_a_folder_that_is_no_checkout_has_no_commit(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    described = describe_environment(tmp_path, "cpu")
    assert (described["commit"], described["dirty"], described["threads"]) == (None, False, None)


def test_the_processor_has_a_name():
    assert name_cpu().strip() == name_cpu() != ""
