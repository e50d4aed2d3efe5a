"""The HTML report read as text."""

from __future__ import annotations

import base64
import itertools
import math
import posixpath
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from fwlora.experiment.evaluation.claims.verdicts import Finding
from fwlora.experiment.evaluation.compare.results import Reason
from fwlora.experiment.evaluation.evidence import Evidence, gather_evidence
from fwlora.experiment.evaluation.figures.draw import Figures
from fwlora.experiment.evaluation.figures.style import Drawing
from fwlora.experiment.evaluation.report.claims import GroupedReason, arrange_strip, format_finding, group_reasons
from fwlora.experiment.evaluation.report.render import render_report
from fwlora.experiment.evaluation.report.text import name_anchors, typeset
from tests.helpers.evaluation_records import change, make_record
from tests.helpers.pages import (
    CLAIMS,
    ENVIRONMENT,
    HOSTILE,
    METHODS,
    ORIGIN,
    POLICY,
    Page,
    make_figures,
    make_run,
    parse,
)


@pytest.fixture(scope="module")
def page(html: bytes) -> Page:
    return parse(html)


def test_equal_input_gives_equal_bytes(evidence: Evidence, drawing: Drawing, html: bytes):
    assert render_report(evidence, make_figures(evidence, drawing), ORIGIN) == html


def test_nothing_is_fetched(page: Page, html: bytes):
    assert {"http-equiv": "Content-Security-Policy", "content": POLICY} in page.all("meta")
    assert not page.all("link", "iframe", "object", "embed", "base")
    assert all(not given.get("src") for given in page.all("script"))
    assert all(given["src"].startswith("data:image/svg+xml;base64,") for given in page.all("img"))
    assert all(re.fullmatch(r"#.+|[^:]+\.pdf", given["href"]) for given in page.all("a", "use"))
    assert not re.search(rb"https?://|url\(|@import", html)


def test_structure_is_that_of_a_document(page: Page):
    ids = [given["id"] for _, given in page.elements if "id" in given]
    assert len(ids) == len(set(ids))
    assert not any(re.search(r"\s", identifier) for identifier in ids)
    targets = {unquote(given["href"][1:]) for given in page.all("a", "use") if given["href"].startswith("#")}
    assert targets <= set(ids)
    assert [given["lang"] for given in page.all("html")] == ["en"]
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert len(page.all("caption")) == len(page.all("table"))
    assert {given.get("scope") for given in page.all("th")} == {"row", "col"}
    assert all(given["alt"] for given in page.all("img"))
    order = [given["id"] for given in page.all("section")]
    assert order == ["scores", "verdicts", "warnings", "methods", "differences", "figures", "runs", "provenance"]


def test_every_claim_warning_and_run_is_there(page: Page, evidence: Evidence):
    text = page.text
    for result in evidence.claim_results:
        assert typeset(result.claim.statement) in text
        assert result.claim.quote in text
        for finding in result.findings:
            assert format_finding(result, finding) in text
    tally = re.search(r"(\d+) supported\s+(\d+) refuted\s+(\d+) undecided", " ".join(text.split()))
    verdicts = [result.verdict for result in evidence.claim_results]
    assert tally and [int(count) for count in tally.groups()] == [
        verdicts.count(name) for name in ("supported", "refuted", "undecided")
    ]
    assert len(set(verdicts)) > 1
    for warning in evidence.warnings:
        assert typeset(warning.text) in text
    for run in evidence.runs:
        assert text.count(run.run_id) >= 3
    assert len([given for given in page.all("details") if given.get("class") == "run"]) == len(evidence.runs) == 12


def test_what_runs_say_is_escaped(page: Page, html: bytes):
    assert html.count(b"<script>") == 1
    assert b"alert(" not in html.split(b"<script>")[1]
    assert page.text.count(HOSTILE) >= 5


def test_numbers_are_those_of_the_statistics(page: Page, evidence: Evidence):
    groups = [(cell, group) for cell in evidence.cells for group in cell.groups]
    scores = [group.mean(cell.primary_eval_name) for cell, group in groups]
    assert [float(value or "") for _, value in page.column("methods-table", 4)] == scores
    cell, group = groups[0]
    mean, deviation = group.mean(cell.primary_eval_name), group.standard_deviation(cell.primary_eval_name)
    assert mean is not None and deviation is not None
    assert page.column("methods-table", 4)[0][0] == f"{100 * mean:.2f} ± {100 * deviation:.2f}"
    assert page.column("methods-table", 7)[0] == ("101.5 ± 0.7", "101.5")
    assert page.column("methods-table", 8)[0] == ("248,000", "248000.0")
    assert ("248,000 → 224,000", "224000.0") in page.column("methods-table", 8)

    pairs = evidence.comparison.pairs
    shown = page.column("pairs-table", 2)
    assert [float(value or "") for _, value in shown] == [pair.primary.tests.mean for pair in pairs]
    for (text, _), pair in zip(shown, pairs, strict=True):
        difference = pair.primary
        interval = f"[{100 * difference.low:+.2f}, {100 * difference.high:+.2f}]"
        assert text == f"{100 * difference.tests.mean:+.2f} {interval}".replace("-", "−")
    holm = [float(value or "") for _, value in page.column("pairs-table", 7)]
    assert holm == [pair.t_p_value_holm for pair in pairs]
    ratios = [float(value or "") for _, value in page.column("pairs-table", 10)]
    assert ratios == [pair.training_time_ratio.ratio for pair in pairs]
    pooled = evidence.comparison.pooled
    assert [float(value or "") for _, value in page.column("pooled-table", 3)] == [entry.mean for entry in pooled]
    assert [float(value or "") for _, value in page.column("pooled-table", 7)] == [
        entry.p_value_holm for entry in pooled
    ]
    seeds = [seed.mcnemar.p_value for pair in pairs for seed in pair.per_seed]
    assert [float(value or "") for _, value in page.column("seeds-table", 6)] == seeds


def test_figures_are_embedded_and_their_files_named(page: Page, evidence: Evidence, drawing: Drawing, html: bytes):
    figures = make_figures(evidence, drawing)
    expected = {path.as_posix() for path in figures.files(Path("results"))}
    named = {given["href"] for given in page.all("a") if given["href"].endswith(".pdf")}
    assert {posixpath.normpath(unquote(f"results/comparison/report/{name}")) for name in named} == expected
    # The matrix of a run is on its page as a table.
    assert len(page.all("img")) == 1 + 2 + 12
    assert base64.b64decode(page.all("img")[0]["src"].partition(",")[2]) == drawing.svg
    assert (page.all("img")[0]["width"], page.all("img")[0]["alt"]) == (page.all("img")[1]["width"], "A curve")


def test_a_run_page_holds_what_was_recorded(html: bytes, evidence: Evidence):
    run_id = "adalora-cola-110M--seed 2"
    start = html.index(b'<details class="run" id="run-adalora-cola-110M--seed-2">')
    text = parse(html[start : html.index(b"</div>\n</details>", start) + len(b"</div>\n</details>")]).text
    run = next(run for run in evidence.runs if run.run_id == run_id)
    assert "99.00 (epoch 2)" in text and "selected on the reported split, never compared" in text
    assert "6.2" in text and "248,000" in text
    assert f"results/{run_id}/wandb" in text and f"python -m src.main run={run_id}" in text
    correct = int(((run.labels == run.predictions) & (run.labels == 1)).sum())
    gold = int((run.labels == 1).sum())
    assert f"{correct} {correct / gold:.1%}" in text
    assert "run.training.learning_rate" in text and "0.0002" in text
    assert "train-cola" in text and "9f31c07be2d4a1f0" in text and "dirty: uncommitted changes" in text


def test_provenance_says_what_agrees_and_what_does_not(page: Page, html: bytes):
    text = " ".join(page.text.split())
    assert "2 of 12 runs were trained with uncommitted changes" in text
    provenance = " ".join(parse(html[html.index(b'<section id="provenance"') : html.index(b"</main>")]).text.split())
    assert f"commit {ENVIRONMENT['commit']} 10 of 12" in provenance
    assert f"{ENVIRONMENT['commit']} dirty: uncommitted changes adalora-cola-110M--seed 2, adalora-sst2" in provenance
    assert "torch 2.13.0 all 12" in provenance and "precision bf16 all 12" in provenance
    assert "glue/cola training data fingerprint train-cola all 6" in provenance
    assert "roberta-base encoder fingerprint 9f31c07be2d4a1f0 all 12" in provenance
    assert ORIGIN.command in provenance
    assert "recorded no command" not in provenance


def test_runs_of_older_programs(drawing: Drawing):
    found = gather_evidence([make_record("old", "baseline_lora"), make_run("new", "adalora", 1)], {}, resamples=50)
    text = " ".join(parse(render_report(found, Figures({}, {}, {}), ORIGIN)).text.split())
    assert "1 run recorded no command." in text
    assert "commit not recorded old" in text
    assert "No claims were given, so there is nothing to judge." in text
    assert "No figures were drawn." in text
    assert "AdaLoRA − LoRA" in text


def test_one_run(drawing: Drawing):
    found = gather_evidence([make_run("only", "proposed_fw_lora", 1)], CLAIMS, resamples=50)
    page = " ".join(parse(render_report(found, Figures({}, {}, {}), ORIGIN)).text.split())
    assert "No cell has runs of two methods that are compared, so there is no difference to test." in page
    text = " ".join(parse(render_report(found, make_figures(found, drawing), ORIGIN)).text.split())
    assert "1 run, 1 method, 1 seed, 1 cell: glue/sst2, roberta-base, 0.2\xa0%." in text.replace("0.2 %", "0.2\xa0%")
    assert text.count("not measured") == len(CLAIMS)
    assert "0 supported 0 refuted 10 undecided" in text


def test_one_seed_allows_no_test_over_seeds(drawing: Drawing):
    runs = [make_run(method, method, 1) for method in METHODS]
    found = gather_evidence(runs, CLAIMS, resamples=50)
    text = " ".join(parse(render_report(found, make_figures(found, drawing), ORIGIN)).text.split())
    assert "No seed-level test is possible: there is one paired seed." in text
    assert "no test over seeds; 1 paired seed." in text


def test_seeds_that_cannot_be_paired(drawing: Drawing):
    runs = [make_run("a", "baseline_lora", 1), make_run("b", "proposed_fw_lora", 2)]
    found = gather_evidence(runs, CLAIMS, resamples=50)
    text = " ".join(parse(render_report(found, make_figures(found, drawing), ORIGIN)).text.split())
    assert "no seed-level test possible: no seed was run with both methods" in text


def test_a_verdict_about_another_model_says_so():
    runs = [change(make_run(m, m, 1), config__run__model__name="MiniLM-L6") for m in METHODS]
    found = gather_evidence(runs, {"above-lora": CLAIMS["above-lora"]}, resamples=50)
    text = " ".join(parse(render_report(found, Figures({}, {}, {}), ORIGIN)).text.split())
    assert "roberta-base on sst2 and cola. Evaluated here: glue/sst2, MiniLM-L6, 0.2" in text
    assert "This is another model or data set than the claim names: the verdict is about these runs" in text
    found = gather_evidence([make_run(m, m, 1) for m in METHODS], {"above-lora": CLAIMS["above-lora"]}, resamples=50)
    assert b"another model" not in render_report(found, Figures({}, {}, {}), ORIGIN)


def test_cells_that_a_verdict_leaves_out_are_named():
    runs = [
        make_run(f"{m} {subset} {seed}", m, seed, subset)
        for m in METHODS
        for subset in ("sst2", "cola")
        for seed in (1, 2)
    ]
    runs = [
        change(run, config__run__training__learning_rate=3e-4) if run.run_id.startswith("baseline_lora sst2") else run
        for run in runs
    ]
    found = gather_evidence(runs, {"above-lora": CLAIMS["above-lora"]}, resamples=50)
    text = " ".join(parse(render_report(found, Figures({}, {}, {}), ORIGIN)).text.split())
    assert "Without glue/sst2, roberta-base, 0.2 %." in text
    assert "Left out: glue/sst2, roberta-base, 0.2 %: its runs differ in more than the method (unequal training" in text


def strip_of(evidence: Evidence, claim_id: str, **finding: Any):
    result = next(result for result in evidence.claim_results if result.claim_id == claim_id)
    found = Finding(cells=("c",), **finding)
    return arrange_strip(replace(result, findings=(found,)), found)


def test_strip_of_a_difference(evidence: Evidence):
    # From -1 to 3 with a tenth of the span at each end: 4.8 points on 280.
    strip = strip_of(evidence, "adalora-above-lora", value=1.0, low=-1.0, high=3.0)
    assert strip is not None
    assert strip.value == round(2.4 / 4.8 * 280, 1)
    assert strip.interval == (round(0.4 / 4.8 * 280, 1), round(4.4 / 4.8 * 280, 1))
    assert strip.bounds == (strip.neutral,) == (round(1.4 / 4.8 * 280, 1),)
    assert strip.claimed == (strip.bounds[0], 280.0)
    assert strip.labels == ((strip.bounds[0], "0", "middle"),)
    assert strip_of(evidence, "adalora-above-lora") is None


def test_strip_of_a_ratio_is_one_of_logarithms(evidence: Evidence):
    strip = strip_of(evidence, "adalora-10-to-20-percent-slower-than-lora", value=1.15, low=1.12, high=1.21)
    assert strip is not None
    span = math.log(1.21)
    assert strip.value == round((math.log(1.15) / span + 0.1) / 1.2 * 280, 1)
    assert strip.claimed == strip.bounds
    assert [label for _, label, _ in strip.labels] == ["1.1", "1.2", "1"]
    narrow = strip_of(evidence, "adalora-10-to-20-percent-slower-than-lora", value=9.0, low=0.2, high=99.0)
    assert narrow is not None
    assert [(label, anchor) for _, label, anchor in narrow.labels] == [("1.1", "end"), ("1.2", "start")]


def test_texts_are_typeset_and_names_left_alone():
    assert typeset("-0.30 points [-1, +2]") == "−0.30 points [−1, +2]"
    assert typeset("roberta-base-110M--CoLA--0 5e-05") == "roberta-base-110M--CoLA--0 5e-05"
    assert typeset("AdaLoRA's 80% of 0.2 %") == "AdaLoRA’s 80\u00a0% of 0.2\u00a0%"
    assert name_anchors("run", ["a b", "a-b", "ü", "a/b"]) == {
        "a b": "run-a-b",
        "a-b": "run-a-b-2",
        "ü": "run--",
        "a/b": "run-a-b-3",
    }


def test_equal_reasons_are_grouped():
    reasons = [Reason("a", "no runs; of any kind"), Reason(None, "one seed"), Reason("b", "no runs; of any kind")]
    assert group_reasons(reasons) == [
        GroupedReason("No runs; of any kind", ("a", "b")),
        GroupedReason("One seed", ()),
    ]
    assert group_reasons([]) == []
