"""The workflows of ``.github/workflows``, played step by step in clean clones against a W&B server on loopback."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.helpers.paths import CONFIG_DIR, REPOSITORY
from tests.helpers.wandb_server import API_KEY, ENTITY, WandbServer
from tests.helpers.workflows import WORKFLOWS, Job, Service, evaluate, load_workflow, make_clean_repository

METHODS = ("comparative-1", "comparative-2", "comparative-3", "proposed")
RUN_IDS = [f"{method}-roberta-base-110M--CoLA-GLUE-s1" for method in METHODS]
FAILS_AT_FIRST = RUN_IDS[2]
RESULTS = Path(".research", "results")
# Of every runner: no hub, one thread, and a client that does not keep rows for long.
MACHINE = {
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1",
    "WANDB_ERROR_REPORTING": "false", "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "0.2",
}  # fmt: skip
NAMES = ("tests", "experiment", "evaluation")


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    return make_clean_repository(tmp_path_factory.mktemp("repository"))


@pytest.fixture(scope="module")
def tiny(tiny_roberta, tiny_glue) -> str:
    return (
        f"run.model.pretrained_id={tiny_roberta} run.dataset.name={tiny_glue} run.model.parameter_budget_percent=5.0 "
        "run.optuna.n_trials=0 wandb.required=true"
    )


def make_service(repository: Path, folder: Path, server: WandbServer) -> Service:
    variables = {"WANDB_BASE_URL": server.url, "WANDB_ENTITY": ENTITY, "WANDB_PROJECT": "study"}
    return Service(repository, folder, variables, {"WANDB_API_KEY": API_KEY}, MACHINE)


@dataclass
class Killer:
    """Kills the training of a run, once: it has trained, and the server holds a part of it."""

    run_id: str
    server: WandbServer
    folder: Path
    killed: int = 0

    def watch(self, line: str) -> None:
        if not line.startswith("step ") or self.killed:
            return
        for process in psutil.process_iter(["cmdline"]):
            command = process.info["cmdline"] or []
            is_the_run = "src.train" in command and any(word.endswith(f"run.run_id={self.run_id}") for word in command)
            if is_the_run and Path(process.cwd()).is_relative_to(self.folder):
                self._let_rows_pass(process)
                process.kill()
                self.killed += 1

    def _let_rows_pass(self, process: psutil.Process) -> None:
        """Stop the process but for moments in which its W&B client speaks, until the server has heard of a step."""
        process.suspend()
        for _ in range(100):
            if any(run.name == self.run_id and run.lines for run in list(self.server.runs.values())):
                return
            process.resume()
            time.sleep(0.02)
            process.suspend()
            time.sleep(0.3)


@dataclass
class Played:
    """Runs made by the workflow ``experiment``, evaluated from the server alone, and from the files they left.

    Attributes:
        jobs: of the runs.
        killer: of the one that fails at first.
        evaluation: job that evaluates.
        from_server: results by path.
        from_files: likewise.
        rows: on the server by run id.
    """

    jobs: list[Job]
    killer: Killer
    evaluation: Job
    from_server: dict[str, bytes]
    from_files: dict[str, bytes]
    rows: dict[str, int]


def read_results(folder: Path) -> dict[str, bytes]:
    """What an evaluation writes, by path."""
    files = {path.relative_to(folder): path.read_bytes() for path in sorted(folder.glob("*/**/*")) if path.is_file()}
    return {
        path.as_posix(): content
        for path, content in files.items()
        if not {"wandb", "logs", "adapter", "attempts"}.intersection(path.parts)
    }


def play_everything(repository: Path, tiny: str, folder: Path) -> Played:
    run_ids = json.dumps(RUN_IDS)
    with WandbServer() as server:
        service = make_service(repository, folder, server)
        killer = Killer(FAILS_AT_FIRST, server, folder)
        service.watch = killer.watch
        jobs = []
        for some, overrides in ((RUN_IDS[:2], ""), (RUN_IDS[2:], "run.fw_lora.warmup_steps=4")):
            overrides = f"{tiny} run.training.epochs=4 run.training.learning_rate=5.0e-3 {overrides}"
            jobs += service.dispatch("experiment", run_ids=json.dumps(some), mode="full", overrides=overrides)
        assert all(job.passed for job in jobs), "\n".join(job.printed for job in jobs)
        rows = {run_id: len(server.run(run_id, "study").history) for run_id in RUN_IDS}
        (evaluation,) = service.dispatch("evaluation", run_ids=run_ids)
        assert evaluation.passed, evaluation.printed
    # The server is gone: what the runs left is all that there is here.
    here = folder / "here"
    subprocess.run(["git", "clone", "-q", repository, here], check=True)
    for name in ("stdout.txt", "stderr.txt", "docker_build.log"):
        (here / RESULTS).mkdir(parents=True, exist_ok=True)
        (here / RESULTS / name).write_text("what pipelines leave there\n")
    for run_id in RUN_IDS:
        shutil.copytree(service.artifacts / f"full-77-{run_id}", here / RESULTS, dirs_exist_ok=True)
    command = ["src.evaluate", f"results_dir={RESULTS}", f"run_ids={run_ids}", "source=files"]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), **service.machine, **service.variables}
    done = subprocess.run(
        [sys.executable, "-u", "-m", *command], cwd=here, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    from_server = read_results(service.artifacts / "evaluation-77")
    return Played(jobs, killer, evaluation, from_server, read_results(here / RESULTS), rows)


def test_runs_and_their_evaluation_from_the_server_alone(repository, tiny, tmp_path):
    played = play_everything(repository, tiny, tmp_path)
    check_the_second_attempt(played)
    check_that_files_and_server_give_the_same_bytes(played)
    check_what_lies_on_top(played)


def check_the_second_attempt(played: Played) -> None:
    assert played.killer.killed == 1
    again = [job.name for job in played.jobs if "::warning::The first attempt ended with exit code 137" in job.printed]
    assert again == [f"{FAILS_AT_FIRST} (full)"]
    assert len(set(played.rows.values())) == 1, "the server holds each row once, whichever attempt logged it"
    steps = {
        run_id: [row["global_step"] for row in read_history(played, run_id) if "train_loss" in row]
        for run_id in RUN_IDS
    }
    assert all(numbers == list(range(1, 41)) for numbers in steps.values()), "each step counts once"


def read_history(played: Played, run_id: str) -> list[dict]:
    return json.loads(played.from_server[f"{run_id}/report/history.json"])["history"]


def check_that_files_and_server_give_the_same_bytes(played: Played) -> None:
    from_files = {name: content.replace(b"source=files", b"source=api") for name, content in played.from_files.items()}
    assert from_files.keys() == played.from_server.keys()
    different = [name for name, content in from_files.items() if content != played.from_server[name]]
    assert not different
    assert {f"{run_id}/{run_id}_learning_curve.pdf" for run_id in RUN_IDS} <= from_files.keys()
    claims = json.loads(played.from_server["comparison/report/claims.json"])
    assert {claim["verdict"] for claim in claims.values()} >= {"undecided"}
    assert played.evaluation.outcomes["Fail without a figure"] == "success"


def check_what_lies_on_top(played: Played) -> None:
    top = {path for path in map(Path, played.from_server) if len(path.parts) == 2}
    documents = {path.name for path in top if path.suffix != ".pdf"}
    assert documents == {"metrics.json", "aggregated_metrics.json"}
    figures = [Path(name).name for name in played.from_server if name.endswith(".pdf")]
    assert len(figures) == len(set(figures))


def test_a_trial_passes_and_a_mistake_fails_the_job_without_a_second_attempt(repository, tiny, tmp_path):
    with WandbServer() as server:
        service = make_service(repository, tmp_path, server)
        jobs = service.dispatch("experiment", run_ids=json.dumps([RUN_IDS[3], "no-such-run"]), overrides=tiny)
        assert not server.runs, "a trial is not recorded"
        (evaluation,) = service.dispatch("evaluation", run_ids='["never-run"]')
    assert [job.passed for job in jobs] == [True, False] and not evaluation.passed
    assert jobs[1].printed.count("error: ") == 1 and "unknown run id" in jobs[1].printed
    assert evaluation.outcomes["Fail without a figure"] == "skipped"
    assert (service.artifacts / f"trial-77-{RUN_IDS[3]}" / RUN_IDS[3] / "logs" / "trial.log").is_file()


@pytest.mark.slow
def test_a_trial_of_every_run_file_passes(repository, tiny, tmp_path):
    run_ids = sorted(path.stem for path in (CONFIG_DIR / "runs").glob("*.yaml"))
    needs_no_hub = [run_id for run_id in run_ids if run_id.endswith("acceptability")]
    needs_hub = [run_id for run_id in run_ids if run_id not in needs_no_hub]
    with WandbServer() as server:
        service = make_service(repository, tmp_path, server)
        jobs = [
            job
            for some, overrides in ((needs_no_hub, ""), (needs_hub, tiny))
            for job in service.dispatch("experiment", run_ids=json.dumps(some), mode="trial", overrides=overrides)
        ]
    assert [job.printed for job in jobs if not job.passed] == []
    assert len(jobs) == len(run_ids) == 28


# --- what the files say ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_jobs_have_little_power_and_an_end(name):
    workflow = load_workflow(name)
    assert workflow["permissions"] == {}
    for job in workflow["jobs"].values():
        assert job["permissions"] == {"contents": "read"}
        limit = job["timeout-minutes"]
        assert isinstance(limit, int) or evaluate(limit[3:-2], {"inputs": {"mode": "full"}}) == 6000
        assert "secrets." not in json.dumps([workflow.get("env"), job.get("env"), job.get("strategy")])
        for step in job["steps"]:
            assert "${{" not in step.get("run", ""), "inputs reach the shell as variables"
            needs_secrets = "src.main" in step.get("run", "") or "src.evaluate" in step.get("run", "")
            assert ("secrets." in json.dumps(step)) == needs_secrets
            if "uses" in step:
                assert re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", step["uses"])


def test_jobs_of_one_run_wait_for_each_other():
    job = load_workflow("experiment")["jobs"]["run"]
    assert job["concurrency"] == {
        "group": "experiment-${{ inputs.mode }}-${{ matrix.run_id }}", "cancel-in-progress": False
    }  # fmt: skip
    assert job["strategy"]["fail-fast"] is False


def test_a_run_that_w_and_b_does_not_hear_of_fails_unless_that_is_asked_for():
    """It would be lost to the evaluation, which knows W&B alone."""
    form = load_workflow("experiment")["on"]["workflow_dispatch"]["inputs"]
    assert form["overrides"]["default"] == "wandb.required=true"


def test_commands_are_those_of_the_readme_and_the_makefile():
    readme = (REPOSITORY / "README.md").read_text()
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
    lines = [
        line.strip()
        for name in NAMES
        for job in load_workflow(name)["jobs"].values()
        for step in job["steps"]
        for line in step.get("run", "").splitlines()
    ]
    for line in lines:
        if line.startswith("make "):
            assert line.removeprefix("make ") in targets
        if line.startswith("uv run"):
            assert re.match(r"uv run (python -u -m )?\S+", line)[0] in readme
    assert sum(line.startswith(("make ", "uv run")) for line in lines) >= 6


def test_linters_find_nothing():
    tools = Path(sys.executable).parent
    files = sorted(map(str, WORKFLOWS.glob("*.yml")))
    assert len(files) == 3
    for command in (
        ["zizmor", "--offline", "--quiet", "--persona", "pedantic", *files],
        ["check-jsonschema", "--builtin-schema", "vendor.github-workflows", *files],
    ):
        done = subprocess.run([tools / command[0], *command[1:]], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
