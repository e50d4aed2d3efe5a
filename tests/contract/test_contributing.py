"""The examples of CONTRIBUTING.md: four as a plugin through whole runs and their evaluation."""

from __future__ import annotations

import copy
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from rich.console import Console

from fwlora.adapters import find_adapter_pairs
from fwlora.experiment.engine import optimizer
from fwlora.experiment.engine.loop import train
from fwlora.experiment.engine.task import Task
from fwlora.experiment.engine.watch import TrainingWatch
from fwlora.experiment.fused import families
from fwlora.experiment.fused.forward import PlainClassifier, make_classifier
from fwlora.experiment.study.execution import run_study
from fwlora.experiment.study.launch import unregister_launcher
from fwlora.experiment.study.spec import load_study, plan_study
from tests.gate.training_cases import attach_method, make_options, make_split
from tests.helpers.engine_options import CPU
from tests.helpers.fused_models import adapt, make_base
from tests.helpers.pages import parse
from tests.helpers.paths import CONFIG_DIR, REPOSITORY
from tests.helpers.study_repository import make_study_repository

TEXT = (REPOSITORY / "CONTRIBUTING.md").read_text()
IN_PLUGIN = ("A method", "A measure", "A tracker", "A task")
LORA = "comparative-1-roberta-base-110M--CoLA-GLUE"


def find_blocks(language: str) -> dict[str, str]:
    """Return the first block of a language in each section, by the section's title."""
    sections = re.split(r"^## (.+)$", TEXT, flags=re.MULTILINE)[1:]
    found = {}
    for title, text in zip(sections[::2], sections[1::2], strict=True):
        blocks = re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
        if blocks:
            (found[title],) = blocks
    return found


PYTHON = find_blocks("python")


def execute(title: str) -> dict:
    names: dict = {"__name__": "example"}
    exec(compile(PYTHON[title], f"CONTRIBUTING.md: {title}", "exec"), names)
    return names


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the programs with a run file, a claim and data, beside a plugin of the first four examples."""
    root = tmp_path_factory.mktemp("checkout")
    for folder in ("fwlora", "src", "config"):
        shutil.copytree(REPOSITORY / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (root / "config" / "claims").iterdir():
        path.unlink()
    (root / "config" / "claims" / "memory.yaml").write_text(find_blocks("yaml")["A measure"])
    lora = (CONFIG_DIR / "runs" / f"{LORA}.yaml").read_text()
    capped = lora.replace(LORA, "capped").replace("baseline_lora", "capped_lora") + "capped: {max_norm: 0.001}\n"
    (root / "config" / "runs" / "capped.yaml").write_text(capped)
    site = root / "site"
    installed = site / "my_additions-1.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: my-additions\nVersion: 1\n")
    declared = find_blocks("toml")["Where a new thing goes"]
    (entry,) = re.findall(r'^(\S+) = "(\S+)"$', declared, flags=re.MULTILINE)
    assert "[project.entry-points.fwlora]" in declared
    (installed / "entry_points.txt").write_text(f"[fwlora]\n{entry[0]} = {entry[1]}\n")
    (site / entry[1]).mkdir()
    modules = {title: title.split()[-1] for title in IN_PLUGIN}
    for title, module in modules.items():
        (site / entry[1] / f"{module}.py").write_text(PYTHON[title])
    (site / entry[1] / "__init__.py").write_text(f"from . import {', '.join(modules.values())}\n")
    generator = np.random.default_rng(0)
    (root / "news").mkdir()
    for split, rows in (("train", 96), ("validation", 40)):
        headlines = [" ".join(generator.choice(["the", "dog", "cat", "runs"], size=4)) for _ in range(rows)]
        labels = ["sport" if "dog" in headline else "other" for headline in headlines]
        pd.DataFrame({"headline": headlines, "label": labels}).to_csv(root / "news" / f"{split}.csv", index=False)
    return root


def start(checkout: Path, *command: str) -> str:
    """Run a program of the checkout with the plugin installed; return what it printed."""
    path = os.pathsep.join([str(checkout), str(checkout / "site")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "LINES_FOLDER": str(checkout / "records")}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_a_plugins_method_measure_tracker_and_task_through_trial_full_and_evaluation(checkout, tiny_roberta):
    shared = [
        "tracker=lines", "results_dir=results", f"run.model.pretrained_id={tiny_roberta}", "run.optuna.n_trials=0",
        "run.model.parameter_budget_percent=5.0", f"run.dataset.name={checkout / 'news'}",
        "run.dataset.subset=headlines", "run.training.epochs=1",
    ]  # fmt: skip
    printed = start(checkout, "src.main", "run=capped", "mode=trial", *shared)
    assert "capped_lora, seed 42, mode trial" in printed and "step 2/2" in printed
    assert not (checkout / "records").exists()
    for run_id in ("capped", LORA):
        start(checkout, "src.main", f"run={run_id}", "mode=full", *shared)
    assert sorted(path.stem for path in (checkout / "records").iterdir()) == sorted(["capped", LORA])
    run_ids = f"run_ids={json.dumps(['capped', LORA])}"
    printed = start(checkout, "src.evaluate", "results_dir=results", run_ids, "tracker=lines")
    assert "Capped LoRA" in printed and "balanced_accuracy" in printed

    results = checkout / "results"
    documents = {run: json.loads((results / run / "metrics.json").read_text()) for run in ("capped", LORA)}
    metrics = documents["capped"]
    assert metrics["primary_metric"] == "eval_balanced_accuracy" and metrics["settings"]["capped"] == {
        "max_norm": 0.001
    }
    assert metrics["confusion_matrix"]["label_names"] == ["other", "sport"]
    counts = np.array(metrics["confusion_matrix"]["counts"], dtype=float)
    recall = np.diagonal(counts) / counts.sum(axis=1)
    assert metrics["primary_value"] == pytest.approx(recall.mean())
    norms = metrics["modules"]["delta_norms"]
    assert len(norms) == len(metrics["modules"]["names"]) and max(norms) <= 0.001 * (1 + 1e-5)
    assert max(documents[LORA]["modules"]["delta_norms"]) > 0.001, "the cap has to bind"

    claim = json.loads((results / "comparison" / "report" / "claims.json").read_text())["memory"]
    memory = [document["summary"]["peak_memory_mib"] for document in documents.values()]
    assert claim["unit"] == "ratio" and claim["findings"][0]["value"] == pytest.approx(memory[0] / memory[1])
    text = " ".join(parse((results / "comparison" / "report" / "report.html").read_bytes()).text.split())
    for expected in (
        "Capped LoRA needs at most twice LoRA’s memory",
        "Capped LoRA / LoRA, ratio of peak memory: at most 2",
    ):
        assert expected in text
    assert "news/headlines" in text and "balanced accuracy" in text
    assert any("balanced_accuracy" in path.name for path in (results / "comparison").glob("*.pdf"))


def test_every_section_of_the_table_has_its_example():
    linked = {title.capitalize() for title in re.findall(r"\| \[([a-z ]+)\]\(#", TEXT)}
    assert linked == {*PYTHON, "A figure"}
    for path in re.findall(r"`(fwlora/\S+?)`", TEXT):
        assert (REPOSITORY / path).exists(), path


@pytest.fixture
def family() -> Iterator[None]:
    before = dict(families._FAMILIES)
    execute("A model family")
    yield
    families._FAMILIES.clear()
    families._FAMILIES.update(before)


@pytest.mark.usefixtures("family")
def test_the_family_is_computed_by_the_fused_path():
    model = adapt(make_base("data2vec-text")).eval()
    fused, remark = make_classifier(model, find_adapter_pairs(model), "fp32", lambda: None, fast=True)
    tokens = torch.randint(3, 60, (4, 11), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    assert remark is None and not isinstance(fused, PlainClassifier)
    expected = PlainClassifier(model)(**inputs)
    assert torch.allclose(fused(**inputs), expected, atol=1e-12) and expected.std() > 0.01


def test_the_optimizer_takes_its_steps():
    names = execute("An optimizer")
    try:
        layer = torch.nn.Linear(2, 1, bias=False)
        layer.weight.data = torch.tensor([[1.0, 2.0]])
        made = optimizer.make_optimizer(layer, replace(make_options(), optimizer="sgd"))
        assert type(made) is torch.optim.SGD and "sgd" in optimizer.known_optimizers() and names["make_sgd"]
        layer(torch.tensor([[3.0, 1.0]])).sum().backward()
        made.step()
        assert layer.weight.tolist()[0] == pytest.approx([0.97, 1.99], abs=1e-3)
    finally:
        optimizer.unregister_optimizer("sgd")


def test_the_launcher_makes_the_runs_of_a_study(tmp_path):
    code = (
        "import sys, pathlib; pathlib.Path('made').mkdir(exist_ok=True); pathlib.Path('made', sys.argv[1][4:]).touch()"
    )
    repository = make_study_repository(tmp_path, code)
    planned = plan_study(load_study("mine", repository / "config"), repository / "config", {})
    execute("A launcher")
    try:
        assert run_study(planned, repository, Console(file=io.StringIO()), "four") == 0
    finally:
        unregister_launcher("four")
    assert {path.name for path in (repository / "made").iterdir()} == {run.arguments[0][4:] for run in planned}


def test_the_methods_state_is_saved_and_continued():
    method_class = execute("State")["CountingMethod"]
    task = Task(pad_token_id=1, num_classes=2, task_metric="accuracy")
    states = []

    class Keep(TrainingWatch):
        def after_step(self, state):
            states.append(copy.deepcopy(state.state_dict()))

    def run(resume_from=None):
        model, lora = attach_method("lora", {})
        method = method_class(lora.pairs)
        steps = train(
            model,
            method,
            make_split(24, 0),
            make_split(8, 1),
            make_options(),
            task,
            CPU,
            log=lambda row: None,
            watch=Keep(),
            resume_from=resume_from,
        ).total_steps
        return method.steps, steps

    whole = run()
    assert whole == (12, 12) and states[4]["method"] == {"steps": 5}
    assert run(states[4]) == whole


def test_the_claim_of_the_example_is_yaml():
    assert yaml.safe_load(find_blocks("yaml")["A measure"])["measure"] == "peak_memory"
