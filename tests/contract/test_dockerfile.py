"""The Dockerfile: linted, read, and its steps taken without a container engine."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.image import Image, make_base, read_instructions
from tests.helpers.paths import CONFIG_DIR, REPOSITORY
from tests.helpers.workflows import make_clean_repository

DOCKERFILE = REPOSITORY / "Dockerfile"
LORA = "comparative-1-minilm-L6--acceptability"
# Where packages come from, on machines that say so.
MACHINE_VARIABLES = ("PIP_FIND_LINKS", "UV_FIND_LINKS", "SSL_CERT_FILE", "PIP_CERT", "HTTPS_PROXY", "HTTP_PROXY")


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    return list(read_instructions(DOCKERFILE))


def test_the_linter_finds_nothing():
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([linter, DOCKERFILE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_nothing_is_fetched_once_the_image_is_built(instructions):
    last_run = max(place for place, (name, _) in enumerate(instructions) if name == "RUN")
    settings = " ".join(argument for name, argument in instructions[last_run:] if name == "ENV").split()
    configured = yaml.safe_load((CONFIG_DIR / "config.yaml").read_text())["results_dir"]
    assert {"UV_NO_SYNC=1", "UV_OFFLINE=1", f"RESULTS_DIR={configured}"} <= set(settings)
    # Where pipelines mount the results: /workspace/$RESULTS_DIR.
    assert ("WORKDIR", "/workspace") in instructions


def test_files_written_inside_can_be_read_and_removed_outside(instructions, tmp_path):
    entrypoint = json.loads(dict(instructions)["ENTRYPOINT"])
    script = 'mkdir -p results && echo "$1" > results/file; exit 7'
    done = subprocess.run([*entrypoint, "bash", "-c", script, "bash", "two words"], cwd=tmp_path)
    assert done.returncode == 7 and (tmp_path / "results" / "file").read_text() == "two words\n"
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "results", tmp_path / "results" / "file")]
    assert modes == [0o777, 0o666]


def test_the_image_lacks_no_file_that_git_knows():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    patterns = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line[:1] not in ("#", "")]
    committed_results = ".research/"
    for name in filter(None, listed.stdout.split("\0")):
        if name.startswith(committed_results):
            continue
        path = Path(name)
        starts = [path, *path.parents]
        for pattern in patterns:
            inside = [start.name for start in starts] if pattern.startswith("**/") else [str(start) for start in starts]
            assert not any(Path(part).match(pattern.removeprefix("**/")) for part in inside if "/" not in part), (
                f"{name} is left out by {pattern}"
            )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_its_steps_make_a_machine_that_runs_without_a_network(tmp_path):
    """Debian in a folder takes the part of the base image, ``chroot`` that of the container engine."""
    if os.getuid() or not shutil.which("debootstrap"):
        pytest.skip("needs root, and Debian's package debootstrap")
    root = tmp_path / "root"
    make_base(root)
    machine = {name: os.environ[name] for name in MACHINE_VARIABLES if name in os.environ}
    if wheels := machine.get("UV_FIND_LINKS"):
        shutil.copytree(wheels, root / wheels.lstrip("/"))
    image = Image(root, make_clean_repository(tmp_path / "checkout"), machine)
    image.build()
    run = f'uv run python -u -m src.main run={LORA} results_dir="$RESULTS_DIR" mode="$MODE"'
    results = root / "workspace" / ".research" / "results"
    for user, mode in ((0, "trial"), (1234, "sanity")):
        done = image.run("bash", "-c", run, user=user, MODE=mode)
        assert done.returncode == 0, done.stdout
    assert "SANITY_VALIDATION: PASS" in done.stdout.splitlines()
    for path in (results / LORA).rglob("*"):
        readable = 0o777 if path.is_dir() else 0o666
        assert path.is_symlink() or path.stat().st_mode & readable & 0o444 == readable & 0o444, path
    typed = image.run("bash", "-c", "git status --porcelain --untracked-files=no && uv run fwlora --help")
    assert typed.returncode == 0 and typed.stdout.startswith("usage: fwlora"), typed.stdout
    assert image.run().stdout.startswith("usage: python -u -m src.main"), "what it does where no command is named"
