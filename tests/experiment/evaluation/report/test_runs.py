"""What the report says of single runs, by hand."""

from __future__ import annotations

import numpy as np

from fwlora.experiment.evaluation.compare.cells import group_cells
from fwlora.experiment.evaluation.compare.runs import EvaluatedRun, read_runs
from fwlora.experiment.evaluation.report.runs import (
    NOT_RECORDED,
    Score,
    collect_commands,
    collect_facts,
    describe_commit,
    describe_environment_facts,
    describe_run_page,
    is_dirty,
)
from fwlora.experiment.tracking.records import pack_classes
from tests.helpers.evaluation_records import change, make_record


def read(*records) -> list[EvaluatedRun]:
    return read_runs(records)


def test_a_page_of_one_run():
    record = change(
        make_record("a", count=4),
        summary__eval_labels=pack_classes(np.array([0, 1, 1, 1]), 2),
        summary__eval_predictions=pack_classes(np.array([0, 1, 0, 1]), 2),
        summary__final_eval_accuracy=0.75,
        summary__best_eval_accuracy=0.8,
        summary__best_eval_accuracy_epoch=2,
        summary__final_eval_loss=0.5,
        summary__time_eval_s=6.5,
        summary__peak_memory_mib=1024,
        config__resolved__command="train",
    )
    runs = read(record)
    (cell,) = group_cells(runs)
    page = describe_run_page(cell, cell.groups[0], runs[0])
    assert (page.run.run_id, page.method, page.primary, page.command) == ("a", "LoRA", 0.75, "train")
    assert page.confusion == [("negative", [(1, 1.0), (0, 0.0)]), ("positive", [(1, 1 / 3), (2, 2 / 3)])]
    assert page.scores[0] == Score("accuracy", False, 0.75, 0.8, 2.0)
    assert Score("eval_loss".removeprefix("eval_"), True, 0.5, None, None) in page.scores
    assert page.times == [("training (compared)", 101.0), ("evaluation", 6.5)]
    assert page.parameters == [("adapter, at the start", 248000.0), ("adapter, in use at the end", 248000.0)]
    assert (page.steps, page.peak_memory_mib, page.percent_of_encoder) == (60.0, 1024.0, None)
    assert page.settings["run.training.learning_rate"] == "0.0002" and page.settings["run.method"] == '"baseline_lora"'
    assert ("precision", "bf16") in page.facts and ("commit", NOT_RECORDED) in page.facts


def test_commands_are_listed_once():
    first, second = make_record("a", seed=1), make_record("b", seed=2)
    shared = [change(record, config__resolved__command="train") for record in (first, second)]
    assert collect_commands(read(*shared)).lines == ["train"]
    commands = collect_commands(read(shared[0], second))
    assert (commands.lines, commands.missing) == (["train"], 1)


def test_facts_are_listed_by_value_within_their_scope():
    records = [
        change(make_record("a", seed=1), config__resolved__train_fingerprint="x", summary__encoder_fingerprint="w"),
        change(make_record("b", seed=2), config__resolved__train_fingerprint="y", summary__encoder_fingerprint="w"),
        change(make_record("c", subset="cola"), config__resolved__train_fingerprint="z"),
    ]
    tables = {table.title: table.rows for table in collect_facts(read(*records))}
    assert list(tables) == ["Code, versions and hardware", "Data", "Model"]
    rows = [row for row in tables["Data"] if row.name == "training data fingerprint"]
    shown = [(row.scope, row.of, [(v.text, [run.run_id for run in v.runs]) for v in row.values]) for row in rows]
    assert shown == [("glue/sst2", 2, [("x", ["a"]), ("y", ["b"])]), ("glue/cola", 1, [("z", ["c"])])]
    (encoder,) = tables["Model"]
    assert [(value.text, len(value.runs)) for value in encoder.values] == [("w", 2), (NOT_RECORDED, 1)]


def test_environments_name_their_commit_and_packages():
    environment = {"commit": "c", "dirty": True, "python": "3.11", "threads": 8, "packages": {"torch": "2", "a": "1"}}
    assert describe_environment_facts(environment) == [
        ("commit", "c, DIRTY"),
        ("Python", "3.11"),
        ("system", NOT_RECORDED),
        ("device", NOT_RECORDED),
        ("threads", "8"),
        ("CPU cores", NOT_RECORDED),
        ("a", "1"),
        ("torch", "2"),
    ]
    assert (describe_commit({}), describe_commit({"commit": "c"})) == (NOT_RECORDED, "c")
    (run,) = read(change(make_record("a"), config__resolved__environment=environment))
    assert is_dirty(run) and not is_dirty(read(make_record("a"))[0])
