"""Contrasts by hand: which seeds count, means, intervals, and what they are computed from."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from scipy import stats

from fwlora.experiment.evaluation.compare.bootstrap import ResampledRuns
from fwlora.experiment.evaluation.compare.cells import Cell, group_cells
from fwlora.experiment.evaluation.compare.contrasts import (
    Contrast,
    MissingMeasurementError,
    Sample,
    blocks_of,
    estimate,
    sample_cost,
    sample_quality,
    sample_update_norm,
    share_seeds,
)
from fwlora.experiment.evaluation.compare.results import Reason
from fwlora.experiment.evaluation.compare.runs import read_runs
from tests.helpers.evaluation_records import change, make_record
from tests.helpers.verdict_runs import make_run


def make_sample(cell: str, data: str, values: dict[int, float], rows: list[list[float]] | None = None) -> Sample:
    resampled = None if rows is None else np.array(rows)
    return Sample(cell, data, "-1 lora +1 proposed", tuple(values), np.array(list(values.values())), resampled, 10)


def make_cell(*records) -> tuple[Cell, Contrast]:
    """One cell, and the contrast FW-LoRA minus LoRA in it."""
    (cell,) = group_cells(read_runs(records))
    lora, proposed = cell.groups
    return cell, [(1.0, proposed), (-1.0, lora)]


def test_cells_of_one_data_set_keep_their_common_seeds():
    first = make_sample("a", "sst2", {0: 0.1, 1: 0.2, 2: 0.3}, [[1, 2], [3, 4], [5, 6]])
    second = make_sample("b", "sst2", {1: 0.4, 2: 0.5, 3: 0.6})
    other = make_sample("c", "cola", {7: 0.7, 8: 0.8})
    kept, left_out = share_seeds([first, second, other])
    assert [sample.seeds for sample in kept] == [(1, 2), (1, 2), (7, 8)]
    assert [sample.values.tolist() for sample in kept] == [[0.2, 0.3], [0.4, 0.5], [0.7, 0.8]]
    assert kept[0].resampled.tolist() == [[3, 4], [5, 6]] and kept[1].resampled is None
    assert left_out == [
        Reason("a", "seeds 0, which its other budgets do not have"),
        Reason("b", "seeds 3, which its other budgets do not have"),
    ]


def test_one_common_seed_is_too_few_to_restrict_to():
    samples = [make_sample("a", "sst2", {0: 0.1, 1: 0.2}), make_sample("b", "sst2", {1: 0.4, 2: 0.5})]
    kept, left_out = share_seeds(samples)
    assert [sample.seeds for sample in kept] == [(0, 1), (1, 2)] and left_out == []


def test_a_cell_of_one_seed_is_left_out_where_others_have_more():
    single, several = make_sample("a", "rte", {0: 0.1}), make_sample("b", "sst2", {0: 0.4, 1: 0.5})
    assert share_seeds([single, several]) == ([several], [Reason("a", "one paired seed")])
    assert share_seeds([single]) == ([single], [])


def test_without_examples_the_interval_is_students():
    found = estimate([make_sample("a", "sst2", {0: 1.0, 1: 2.0, 2: 3.0})])
    reach = stats.t.ppf(0.975, 2) / math.sqrt(3)
    assert (found.mean, found.low, found.high) == pytest.approx((2.0, 2.0 - reach, 2.0 + reach))
    assert (found.interval_over, found.examples_error) == ("seeds", 0.0)
    alone = estimate([make_sample("a", "sst2", {0: 1.0})])
    assert (alone.mean, alone.low, alone.high, alone.interval_over) == (1.0, None, None, "nothing")


def test_one_seed_has_an_interval_over_examples():
    row = [0.0, 1.0, 2.0, 3.0, 4.0]
    found = estimate([make_sample("a", "sst2", {0: 2.0}, [row])])
    assert (found.low, found.high) == pytest.approx((0.1, 3.9))
    assert (found.interval_over, found.examples_error) == ("examples", pytest.approx(math.sqrt(2.5)))


def test_seeds_and_examples_by_hand():
    """Three seeds whose scores move together on the resamples, and one part of each that no other seed shares."""
    shared, own = np.array([-1.0, 1.0, -1.0, 1.0]), np.array([[1.0, 1.0, -1.0, -1.0]] * 3) * [[1.0], [-1.0], [0.0]]
    values = np.array([1.0, 2.0, 6.0])
    rows = values[:, None] + 0.5 * shared + 0.3 * own
    found = estimate([make_sample("a", "sst2", {0: 1.0, 1: 2.0, 2: 6.0}, rows.tolist())])
    together = 0.25 * 4 / 3
    alone = ((0.25 + 0.09) * 2 + 0.25) / 3 * 4 / 3
    interaction = (alone - together) / 2
    seeds = 7.0 / 3 - interaction / 2
    reach = math.sqrt(stats.t.ppf(0.975, 2) ** 2 * seeds + stats.norm.ppf(0.975) ** 2 * (together - interaction / 2))
    assert (found.mean, found.low, found.high) == pytest.approx((3.0, 3.0 - reach, 3.0 + reach))
    assert (found.interval_over, found.examples_error) == ("seeds and examples", pytest.approx(math.sqrt(together)))


def test_copies_of_one_seed_have_the_examples_interval_alone():
    row = np.random.default_rng(0).normal(size=500).tolist()
    found = estimate([make_sample("a", "sst2", {0: 0.5, 1: 0.5, 2: 0.5}, [row] * 3)])
    reach = stats.norm.ppf(0.975) * np.std(row, ddof=1)
    assert found.high - found.mean == pytest.approx(reach)


def test_seeds_that_agree_have_an_interval_of_no_width():
    found = estimate([make_sample("a", "sst2", {0: 0.5, 1: 0.5}, [[0.5] * 4, [0.5] * 4])])
    assert (found.mean, found.low, found.high, found.interval_over) == (0.5, 0.5, 0.5, "seeds and examples")


def test_cells_of_one_data_set_and_the_same_seeds_are_one_stratum():
    first, second = make_sample("a", "sst2", {0: 1.0, 1: 3.0}), make_sample("b", "sst2", {0: 2.0, 1: 6.0})
    together = estimate([first, second])
    assert (together.seeds.strata, together.mean) == (1, 3.0)
    # Means 1.5 and 4.5 for the two seeds.
    assert together.seeds.standard_error == pytest.approx(np.std([1.5, 4.5], ddof=1) / math.sqrt(2))
    other = make_sample("c", "cola", {0: 9.0, 1: 9.0})
    three = estimate([first, second, other])
    assert (three.seeds.strata, three.mean) == (2, pytest.approx((2.0 + 4.0 + 9.0) / 3))
    assert blocks_of([first, other]) == [[("sst2", 0), ("sst2", 1)], [("cola", 0), ("cola", 1)]]


def test_quality_is_paired_by_seed():
    rights = {("lora", 1): 3000, ("lora", 2): 3200, ("proposed", 2): 3300, ("proposed", 3): 100}
    cell, contrast = make_cell(*(make_run(role, seed, right) for (role, seed), right in rights.items()))
    scores = {(run.run_id, "accuracy"): np.array([float(run.seed), 0.5]) for run in cell.runs}
    sample = sample_quality(cell, contrast, ResampledRuns(scores, 2))
    assert (sample.seeds, sample.values.tolist(), sample.examples) == ((2,), [0.025], 4000)
    assert sample.resampled.tolist() == [[0.0, 0.0]]
    assert sample.contrast == "+1 proposed -1 lora"


def test_methods_without_a_common_seed_have_no_contrast():
    cell, contrast = make_cell(make_record("l", seed=1), make_record("p", "proposed_fw_lora", 2))
    with pytest.raises(MissingMeasurementError, match="no seed was run with all its methods"):
        sample_quality(cell, contrast, ResampledRuns({}, 2))


def test_costs_are_contrasted_by_their_logarithms():
    lora, proposed = make_record("l"), make_record("p", "proposed_fw_lora")
    times = {"l": change(lora, summary__training_time_s=100.0), "p": change(proposed, summary__training_time_s=150.0)}
    cell, contrast = make_cell(*times.values())
    sample = sample_cost(cell, contrast)
    assert sample.values.tolist() == pytest.approx([math.log(1.5)]) and sample.resampled is None
    with pytest.raises(MissingMeasurementError, match="run p recorded no positive peak_memory_mib"):
        sample_cost(cell, contrast, "peak_memory_mib")


def test_norms_are_means_over_half_of_the_modules():
    names = ["a", "b", "c", "d", "e"]
    recorded = {
        "l": {"summary__module_delta_norms": [1.0, 2.0, 4.0, 0.0, 1.0], "summary__module_importances": [None] * 5},
        "p": {
            "summary__module_delta_norms": [2.0, 2.0, 8.0, 5.0, 1.0],
            "summary__module_importances": [0.1, 0.2, 0.3, 0.4, 0.5],
        },
    }
    cell, contrast = make_cell(
        change(make_record("l"), summary__module_names=names, **recorded["l"]),
        change(make_record("p", "proposed_fw_lora"), summary__module_names=names, **recorded["p"]),
    )
    # Least important: a and b, with ratios 2 and 1.
    low = sample_update_norm(cell, contrast, "least_important")
    assert low.values.tolist() == pytest.approx([math.log(2) / 2])
    # Most important: c and e, with ratios 2 and 1; LoRA did not update d.
    high = sample_update_norm(cell, contrast, "most_important")
    assert high.values.tolist() == pytest.approx([math.log(2) / 2])
    with pytest.raises(MissingMeasurementError, match="which is not part of the contrast"):
        sample_update_norm(cell, contrast[1:], "least_important")


@pytest.mark.parametrize(
    ("device", "cpu", "told"),
    [
        ("AMD EPYC", (100.0, 101.0), "wall-clock and CPU time disagree (3.000 and 1.010)"),
        ("AMD EPYC", (100.0, 300.0), None),
        ("AMD EPYC", (None, None), None),
        ("NVIDIA H200", (100.0, 101.0), None),
    ],
)
def test_times_of_a_busy_machine_decide_nothing(device, cpu, told):
    """LoRA took 100 s and FW-LoRA 300 s; what the processor says of it decides, where it is what computed."""
    given = [
        change(
            make_record(name, method),
            summary__training_time_s=wall,
            summary__cpu_time_s=computed,
            config__resolved__environment={"device": device, "threads": 2},
        )
        for name, method, wall, computed in (
            ("l", "baseline_lora", 100.0, cpu[0]), ("p", "proposed_fw_lora", 300.0, cpu[1])
        )
    ]  # fmt: skip
    cell, contrast = make_cell(*given)
    if told is None:
        assert sample_cost(cell, contrast).values.tolist() == pytest.approx([math.log(3)])
    else:
        with pytest.raises(MissingMeasurementError, match=re.escape(told)):
            sample_cost(cell, contrast)
