"""Real trainings with the unmodified W&B client: a study offline, sent and read back; a server that fails half-way."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from fwlora.experiment.evaluation import evaluate
from fwlora.experiment.evaluation.figures.draw import Figures
from fwlora.experiment.settings.hydra_arguments import compose_settings
from fwlora.experiment.settings.schema import ProgramSettings
from fwlora.experiment.tracking import Tracker, metrics
from fwlora.experiment.tracking.records import RunRecord, unpack_values
from fwlora.experiment.tracking.wandb import writing
from src.evaluate import main
from src.train import run_training
from tests.helpers.paths import CONFIG_DIR
from tests.helpers.wandb_runs import (
    TARGET,
    Outage,
    as_json,
    break_server,
    follow_advice,
    isolated_client,
    load,
    repair_server,
    run_folders,
    serving,
    sync,
)
from tests.helpers.wandb_server import WandbServer

METHODS = {"baseline_lora": "comparative-1", "adalora": "comparative-2", "proposed_fw_lora": "proposed"}
SEEDS = (1, 2)
STEPS = 30
FAILING_STEP = 10


def compose(
    method: str, seed: int, mode: str, results_dir: Path, tiny_roberta: Path, tiny_glue: Path
) -> ProgramSettings:
    """A full run of a tiny model on CoLA-like data, ``STEPS`` optimizer steps."""
    arguments = [
        f"run={METHODS[method]}-roberta-base-110M--CoLA-GLUE-s{seed}", "mode=full", f"results_dir={results_dir}",
        f"wandb.entity={TARGET.entity}", f"wandb.project={TARGET.project}", f"wandb.mode={mode}",
        f"run.model.pretrained_id={tiny_roberta}", "run.model.parameter_budget_percent=5.0",
        f"run.dataset.name={tiny_glue}", "run.optuna.n_trials=0",
        *(["run.fw_lora.warmup_steps=5"] if method == "proposed_fw_lora" else []),
    ]  # fmt: skip
    return compose_settings(arguments, CONFIG_DIR, {})


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    folder = tmp_path_factory.mktemp("study")
    with isolated_client(folder / "home") as patch:
        patch.chdir(folder)
        yield patch


@pytest.fixture(scope="module")
def server(client: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with serving(client) as running:
        yield running


@pytest.fixture(scope="module")
def study(
    server: WandbServer, tmp_path_factory: pytest.TempPathFactory, tiny_roberta: Path, tiny_glue: Path
) -> tuple[Path, list[str], WandbServer]:
    """Three methods x two seeds, run offline: the folder of results, the ids, a server that knows none of them."""
    results_dir, run_ids = tmp_path_factory.mktemp("results"), []
    for method in METHODS:
        for seed in SEEDS:
            settings = compose(method, seed, "offline", results_dir, tiny_roberta, tiny_glue)
            run_training(settings)
            run_ids.append(settings.run.run_id)
    assert server.operations == []
    return results_dir, run_ids, server


@pytest.fixture(scope="module")
def sent_study(study: tuple[Path, list[str], WandbServer]) -> tuple[Path, list[str], WandbServer]:
    """The study after one ``wandb sync`` of all its folders."""
    results_dir, run_ids, server = study
    sync(*(folder for run_id in run_ids for folder in run_folders(results_dir, run_id)))
    assert [server.run(run_id).state for run_id in run_ids] == ["finished"] * len(run_ids)
    return study


def assert_complete(record: RunRecord, seed: int) -> None:
    """All that evaluation needs is there."""
    assert record.finished and record.summary[metrics.COMPLETED] is True
    assert record.config["run"]["training"]["seed"] == seed
    assert record.config["resolved"]["label_names"] == ["0", "1"]
    assert [row[metrics.GLOBAL_STEP] for row in record.history] == list(range(1, STEPS + 1))
    assert sum(metrics.EVAL_LOSS in row for row in record.history) == 3
    assert all(metrics.TRAIN_LOSS in row for row in record.history)
    assert len(unpack_values(record.summary[metrics.EVAL_PREDICTIONS])) == 90


def test_study_is_the_same_bytes_from_its_files_and_from_the_server(
    sent_study: tuple[Path, list[str], WandbServer], tmp_path: Path
) -> None:
    results_dir, run_ids, _ = sent_study
    assert len(set(run_ids)) == len(METHODS) * len(SEEDS)
    files = load(results_dir, "files", *run_ids)
    api = load(tmp_path, "api", *run_ids)
    assert as_json(*files) == as_json(*api)
    assert {record.source for record in api} == {f"{TARGET.entity}/{TARGET.project}/{run_id}" for run_id in run_ids}
    for record, seed in zip(files, SEEDS * len(METHODS), strict=True):
        assert_complete(record, seed)


def test_evaluation_writes_the_same_bytes_from_both(
    sent_study: tuple[Path, list[str], WandbServer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Figures take most of the time, and have a test of their own that equal records give equal bytes.
    monkeypatch.setattr(evaluate, "draw_figures", lambda evidence, workers: Figures({}, {}, {}))
    results_dir, run_ids, _ = sent_study
    place = [f"wandb.entity={TARGET.entity}", f"wandb.project={TARGET.project}"]
    written = []
    for folder, source in ((results_dir, "files"), (tmp_path, "api")):
        assert main([f"results_dir={folder}", f"run_ids={json.dumps(run_ids)}", f"source={source}", *place]) == 0
        paths = [Path(line) for line in capsys.readouterr().out.splitlines() if line.startswith(str(folder))]
        written.append({path.relative_to(folder): path.read_bytes() for path in paths})
    pages = [contents.pop(Path("comparison/report/report.html")).decode() for contents in written]
    assert written[0] == written[1]
    assert sum(path.suffix == ".json" for path in written[0]) == 2 * len(run_ids) + 3
    # The page alone says where a run was read.
    assert f"{TARGET.entity}/{TARGET.project}/{run_ids[0]}" in pages[1] and str(results_dir) in pages[0]
    aggregated = json.loads(written[0][Path("comparison/aggregated_metrics.json")])
    assert aggregated["best_proposed"]["run_id"] in run_ids
    claims = json.loads(written[0][Path("comparison/report/claims.json")])
    assert len(claims) == len(list((CONFIG_DIR / "claims").glob("*.yaml")))


@pytest.mark.parametrize("outage", [500, "stopped"])
def test_training_ends_well_while_its_server_does_not(
    server: WandbServer,
    tmp_path: Path,
    tiny_roberta: Path,
    tiny_glue: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    outage: Outage,
) -> None:
    caplog.set_level("INFO", "fwlora")

    def start(*arguments, _start=writing.start_tracker, **options) -> Tracker:
        tracker = _start(*arguments, finish_timeout_s=1.0, **options)
        log = tracker.log

        def log_and_break(values: Mapping[str, float | int]) -> None:
            if values[metrics.GLOBAL_STEP] == FAILING_STEP:
                break_server(server, outage)
            log(values)

        tracker.log = log_and_break
        return tracker

    monkeypatch.setattr(writing, "start_tracker", start)
    results_dir = tmp_path / "results"
    settings = compose("proposed_fw_lora", 7, "online", results_dir, tiny_roberta, tiny_glue)
    run_id = settings.run.run_id
    server.runs.pop((TARGET.entity, TARGET.project, run_id), None)
    try:
        run_training(settings)
    finally:
        repair_server(server, outage)
    (folder,) = run_folders(results_dir, run_id)
    (line,) = [line for line in caplog.messages if "the upload is not complete" in line]
    assert line.endswith(f"nothing is lost, send the rest with: wandb sync --include-online {folder}")
    assert server.run(run_id).state == "running"
    assert (results_dir / run_id / "adapter").is_dir()

    follow_advice(line)
    (files,), (api,) = load(results_dir, "files", run_id), load(tmp_path / "elsewhere", "api", run_id)
    assert as_json(files) == as_json(api)
    assert_complete(api, 7)
