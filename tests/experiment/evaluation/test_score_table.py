"""The table of scores: what stands where, what is bold, and what each form makes of it."""

from __future__ import annotations

import numpy as np

from fwlora.experiment.evaluation.compare.bootstrap import resample_runs
from fwlora.experiment.evaluation.compare.cells import Cell, group_cells
from fwlora.experiment.evaluation.compare.comparisons import compare_pairs
from fwlora.experiment.evaluation.compare.runs import read_runs
from fwlora.experiment.evaluation.output import tables
from fwlora.experiment.evaluation.output.score_table import arrange_scores
from tests.helpers.evaluation_records import change, make_record

METHODS = ("proposed_fw_lora", "adalora", "baseline_lora")
METRIC = {"sst2": "final_eval_accuracy", "cola": "final_eval_matthews_correlation"}


def make_cells(scores: dict[tuple[str, str, float], list[float]]) -> list[Cell]:
    """Group runs that record the given scores, by method, subset and budget, one per seed."""
    given = []
    for (method, subset, budget), values in scores.items():
        for seed, value in enumerate(values, start=1):
            record = make_record(f"{method}{subset}{budget}{seed}", method, seed, subset=subset, budget=budget)
            given.append(change(record, **{f"summary__{METRIC[subset]}": value}))
    return group_cells(read_runs(given))


def test_methods_stand_down_tasks_across_and_budgets_in_blocks():
    scores = {(m, s, b): [0.5, 0.6] for m in METHODS for s in ("sst2", "cola") for b in (0.5, 0.2)}
    scores[METHODS[0], "cola", 0.2] = [0.66, 0.65]
    del scores[METHODS[1], "cola", 0.5]
    (table,) = arrange_scores(make_cells(scores))
    assert (table.model, table.block_heading, table.seeds) == ("roberta-base", "budget", 2)
    assert table.columns == ("glue/cola (MCC)", "glue/sst2 (Acc.)")
    assert [block.name for block in table.blocks] == ["0.2 %", "0.5 %"]
    assert [label for label, _ in table.blocks[0].rows] == ["LoRA", "AdaLoRA", "FW-LoRA"]
    written = {
        (block.name, label): [score and (score.text, score.is_best) for score in row]
        for block in table.blocks
        for label, row in block.rows
    }
    tie = ("55.0 ± 7.1", True)
    assert written == {
        ("0.2 %", "LoRA"): [("55.0 ± 7.1", False), tie],
        ("0.2 %", "AdaLoRA"): [("55.0 ± 7.1", False), tie],
        ("0.2 %", "FW-LoRA"): [(f"65.5 ± {100 * np.std([0.66, 0.65], ddof=1):.1f}", True), tie],
        ("0.5 %", "LoRA"): [tie, tie],
        ("0.5 %", "AdaLoRA"): [None, tie],
        ("0.5 %", "FW-LoRA"): [tie, tie],
    }


def test_budgets_stand_across_where_there_is_one_task():
    scores = {("baseline_lora", "cola", budget): [0.1 * budget] for budget in (10.0, 2.0)}
    (table,) = arrange_scores(make_cells(scores))
    assert (table.block_heading, table.columns, table.seeds) == ("task", ("2 %", "10 %"), 1)
    (block,) = table.blocks
    assert block.name == "glue/cola (MCC)" and [score.text for score in block.rows[0][1]] == ["20.0", "100.0"]
    assert "one seed" in table.caption and "±" not in table.caption


def test_numbers_of_seeds_are_shown_where_they_differ_and_models_apart():
    scores = {("baseline_lora", "cola", 0.2): [0.5, 0.7], ("adalora", "cola", 0.2): [0.7]}
    (table,) = arrange_scores(make_cells(scores))
    texts = [row[0].text for _, row in table.blocks[0].rows]
    assert texts == ["60.0 ± 14.1 (2)", "70.0 (1)"] and "their number in brackets" in table.caption
    two = [
        make_record("a"),
        change(make_record("b"), config__run__model__name="other", config__run__model__pretrained_id="x/other"),
    ]
    assert [table.model for table in arrange_scores(group_cells(read_runs(two)))] == ["other", "roberta-base"]


def test_markdown_and_latex_set_the_best_in_bold():
    methods = ("baseline_lora", "proposed_fw_lora")
    scores = {(m, s, b): [0.5 + 0.1 * (m != methods[0])] for m in methods for s in METRIC for b in (0.2, 0.5)}
    cells = make_cells(scores)
    comparison = compare_pairs(cells, resample_runs([run for cell in cells for run in cell.runs], 0, 50), 0)
    markdown = tables.render_markdown([], cells, comparison, [])
    assert "| budget | method | glue/cola (MCC) | glue/sst2 (Acc.) |" in markdown
    assert "| 0.2 % | LoRA | 50.0 | 50.0 |\n|  | FW-LoRA | **60.0** | **60.0** |\n| 0.5 % | LoRA" in markdown
    latex = tables.render_latex(cells, comparison)
    scores_table = latex[: latex.index(r"\end{tabular}")].splitlines()
    assert scores_table[1].startswith("% roberta-base: points after the last epoch, one seed")
    assert scores_table[2:] == [
        r"\begin{tabular}{llrr}",
        r"\toprule",
        r"budget & method & glue/cola (MCC) & glue/sst2 (Acc.) \\",
        r"\midrule",
        r"0.2 \% & LoRA & 50.0 & 50.0 \\",
        r" & FW-LoRA & \textbf{60.0} & \textbf{60.0} \\",
        r"\midrule",
        r"0.5 \% & LoRA & 50.0 & 50.0 \\",
        r" & FW-LoRA & \textbf{60.0} & \textbf{60.0} \\",
        r"\bottomrule",
    ]
