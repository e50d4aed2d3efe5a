"""Today's experiment pipelines, step by step: what they type, what they search for, what they fetch afterwards.

Source: github.com/airas-org/airas-template at 5c0545b, .github/workflows; see ``fwlora.experiment.pipeline_contract``.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from fwlora.experiment.pipeline_contract import mirror_run_files
from tests.helpers.wandb_server import API_KEY, ENTITY, WandbServer
from tests.helpers.workflows import make_clean_repository, make_stand_ins

LORA, PROPOSED = "comparative-1-roberta-base-110M--CoLA-GLUE", "proposed-roberta-base-110M--CoLA-GLUE"
RESULTS = ".research/results"
TRAIN = """
set -eo pipefail
mkdir -p "$RESULTS_DIR"
{ uv run python -u -m src.main run=$RUN_ID results_dir="$GIVEN_DIR" mode=$MODE; } \
  >> "$RESULTS_DIR/stdout.txt" 2>> "$RESULTS_DIR/stderr.txt"
"""
PASSES = 'grep -q "${MODE^^}_VALIDATION: PASS" "$RESULTS_DIR/stdout.txt"'
EVALUATE = """
set -eo pipefail
{ uv run python -u -m src.evaluate results_dir="$RESULTS_DIR" run_ids='%s'; } \
  >> "$RESULTS_DIR/stdout.txt" 2>> "$RESULTS_DIR/stderr.txt"
find "$RESULTS_DIR" -type f -name "*.pdf" | read
git add "$RESULTS_DIR"
"""


@pytest.fixture(scope="module")
def repository(tiny_roberta, tiny_glue, tmp_path_factory) -> Path:
    """A clean clone whose run files name a small model, as nothing but run, results_dir and mode is typed."""
    folder = make_clean_repository(tmp_path_factory.mktemp("repository"))
    for run_id in (LORA, PROPOSED):
        path = folder / "config" / "runs" / f"{run_id}.yaml"
        settings = yaml.safe_load(path.read_text())
        settings["model"] |= {"pretrained_id": str(tiny_roberta), "parameter_budget_percent": 5.0}
        settings["dataset"] |= {"name": str(tiny_glue), "metric": "accuracy"}
        settings["training"] |= {"epochs": 4, "learning_rate": 5.0e-3}
        space = {"learning_rate": {"type": "loguniform", "low": 4.0e-3, "high": 9.0e-3}}
        settings["optuna"] |= {"n_trials": 1, "search_space": space}
        if run_id == PROPOSED:
            settings["fw_lora"] |= {"warmup_steps": 4}
        path.write_text(yaml.safe_dump(settings))
    mirror_run_files(folder / "config")
    return folder


class Machine:
    """A clone with an empty environment but for a W&B account."""

    def __init__(self, repository: Path, folder: Path, server: WandbServer) -> None:
        self.clone = folder / "clone"
        subprocess.run(["git", "clone", "-q", repository, self.clone], check=True)
        shutil.copytree(repository / "config", self.clone / "config", dirs_exist_ok=True)
        stand_ins = make_stand_ins(folder)
        self.results = self.clone / RESULTS
        self.environment = {
            "PATH": f"{stand_ins}:/usr/local/bin:/usr/bin:/bin", "HOME": str(folder), "RESULTS_DIR": RESULTS,
            "WANDB_BASE_URL": server.url, "WANDB_API_KEY": API_KEY, "WANDB_ENTITY": ENTITY, "WANDB_PROJECT": "study",
            "WANDB_ERROR_REPORTING": "false", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def play(self, script: str, **more: str) -> int:
        environment = {**self.environment, **more}
        return subprocess.run(["bash", "-c", script], cwd=self.clone, env=environment, timeout=240).returncode

    def read(self, name: str) -> str:
        return (self.results / name).read_text()


@pytest.fixture
def server():
    with WandbServer() as running:
        yield running


@pytest.fixture
def machine(repository, tmp_path, server) -> Machine:
    return Machine(repository, tmp_path, server)


@pytest.mark.parametrize(
    ("mode", "run_id", "given"), [("sanity", LORA, RESULTS), ("pilot", PROPOSED, "")], ids=["sanity", "pilot"]
)
def test_a_run_ends_with_its_pass_line_and_is_recorded_apart(machine, server, mode, run_id, given):
    assert machine.play(TRAIN, MODE=mode, RUN_ID=run_id, GIVEN_DIR=given) == 0, machine.read("stdout.txt")
    assert machine.play(PASSES, MODE=mode) == 0
    *before, summary, verdict = machine.read("stdout.txt").splitlines()
    word = mode.upper()
    assert verdict == f"{word}_VALIDATION: PASS" and summary.startswith(f"{word}_VALIDATION_SUMMARY: {{")
    assert json.loads(summary.partition(": ")[2])["steps"] == {"sanity": 20, "pilot": 30}[mode]
    assert not any("VALIDATION" in line for line in before) and machine.read("stderr.txt") == ""
    assert list(server.runs) == [(ENTITY, f"study-{mode}", run_id)]
    logged = [path.read_bytes() for path in machine.results.rglob("*") if path.is_file() and path.suffix != ".txt"]
    assert logged and not any(b"VALIDATION: " in content for content in logged)
    assert machine.play("git add --dry-run .") == 0


@pytest.mark.slow
def test_full_runs_and_their_evaluation_pass_and_what_is_fetched_is_small(machine, repository, tmp_path, server):
    """Two attempts at each run in one folder, then the evaluation on another machine."""
    for run_id in (LORA, PROPOSED):
        for _ in range(2):
            assert machine.play(TRAIN, MODE="full", RUN_ID=run_id, GIVEN_DIR=RESULTS) == 0, machine.read("stdout.txt")
    (tmp_path / "other").mkdir()
    other = Machine(repository, tmp_path / "other", server)
    other.results.mkdir(parents=True)
    (other.results / "docker_build.log").write_text("built\n")
    assert other.play(EVALUATE % json.dumps([LORA, PROPOSED])) == 0, other.read("stderr.txt")
    for run_id in (LORA, PROPOSED):
        assert json.loads(other.read(f"{run_id}/metrics.json"))["primary_metric"] == "eval_accuracy"
        top = {path.suffix for path in (other.results / run_id).iterdir() if path.is_file()}
        assert top == {".pdf", ".json"}
    aggregated = json.loads(other.read("comparison/aggregated_metrics.json"))
    assert aggregated["metrics"]["eval_accuracy"].keys() == {LORA, PROPOSED}
    documents = [path for path in other.results.glob("*/*.json")]
    assert sorted(path.name for path in documents) == ["aggregated_metrics.json", "metrics.json", "metrics.json"]
    assert all(path.stat().st_size < 100_000 for path in documents)
    staged = subprocess.run(
        ["git", "diff", "--cached", "--name-only"], cwd=other.clone, capture_output=True, text=True, check=True
    ).stdout
    assert f"{RESULTS}/comparison/report/report.html" in staged
