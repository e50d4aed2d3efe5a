"""The choice of a precision, from timings that were recorded on machines, and how they are taken and kept."""

from __future__ import annotations

import json
import time

import pytest
import torch

from fwlora.experiment.engine.precision import cached_timings, choose_precision, time_products

CPU = torch.device("cpu")
MINILM = [(384, 384), (1536, 384), (384, 1536)]


@pytest.mark.parametrize(
    ("fp32_ms", "bf16_ms", "expected", "ratio"),
    [
        (0.99, 0.38, "bf16", "0.38"),  # AMD EPYC (Zen 4), AVX-512 bf16, 2 threads
        (1.10, 1.98, "fp32", "1.80"),  # Intel Xeon, AVX-512 bf16 without matrix tiles
        (1.00, 0.95, "fp32", "0.95"),  # too little to be worth rounding
        (0.41, 0.05, "bf16", "0.12"),  # a GPU with matrix units
    ],
)
def test_bf16_where_its_products_are_faster_by_a_tenth(fp32_ms, bf16_ms, expected, ratio):
    precision, remark = choose_precision("bf16", lambda: {"fp32": fp32_ms / 1e3, "bf16": bf16_ms / 1e3})
    assert precision == expected
    assert remark is not None and f"takes {ratio} times float32's time" in remark and "\n" not in remark


def test_what_the_run_does_not_allow_is_not_measured():
    assert choose_precision("fp32", lambda: pytest.fail("measured")) == ("fp32", None)


def test_products_are_timed_in_a_tenth_of_a_second_and_grow_with_their_size():
    time_products(MINILM, CPU)  # the first products of a process set up their library
    started = time.perf_counter()
    found = time_products(MINILM * 6, CPU)
    assert time.perf_counter() - started < 0.3  # 0.1 s on an idle machine
    larger = time_products([(1536, 1536), (3072, 768)], CPU)
    assert set(found) == {"fp32", "bf16"}
    assert all(0 < found[name] < larger[name] for name in found)
    huge = time_products([(384, 384), (32_768, 8_192)], CPU)
    assert huge["fp32"] < larger["fp32"], "the smaller shapes are enough"


def test_a_machine_is_measured_once(tmp_path):
    asked = []

    def measure():
        asked.append(1)
        return {"fp32": 2e-3, "bf16": 1e-3 * len(asked)}

    first = cached_timings(tmp_path, MINILM, CPU, measure)
    assert cached_timings(tmp_path, [*MINILM, *MINILM], CPU, measure) == first and len(asked) == 1
    assert cached_timings(tmp_path, MINILM[:2], CPU, measure) != first and len(asked) == 2
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        cached_timings(tmp_path, MINILM, CPU, measure)
    finally:
        torch.set_num_threads(threads)
    assert len(asked) == 3


@pytest.mark.parametrize("content", ["", "{", "[]", '{"fp32": 1}', json.dumps({"fp32": 0, "bf16": 1}), '{"fp32": "x"}'])
def test_a_damaged_or_unwritable_cache_is_measured_again(tmp_path, content):
    timings = {"fp32": 2e-3, "bf16": 1e-3}
    cached_timings(tmp_path, MINILM, CPU, lambda: timings)
    (path,) = (tmp_path / "precision").iterdir()
    path.write_text(content)
    other = {"fp32": 2e-3, "bf16": 3e-3}
    assert cached_timings(tmp_path, MINILM, CPU, lambda: other) == other
    (tmp_path / "file").write_text("")
    assert cached_timings(tmp_path / "file", MINILM, CPU, lambda: other) == other
