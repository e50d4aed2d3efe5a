"""The HTML report: read as text, and opened in a real browser."""

from __future__ import annotations

import base64
import io
import itertools
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from evaluation_records import change, make_record
from PIL import Image

from fwlora.experiment.evaluation import figure_style, report
from fwlora.experiment.evaluation.claims import load_claims
from fwlora.experiment.evaluation.drawing import Figures
from fwlora.experiment.evaluation.evidence import Evidence, gather_evidence
from fwlora.experiment.evaluation.figure_style import Drawing
from fwlora.experiment.evaluation.report import ReportOrigin, arrange_strip, render_report
from fwlora.experiment.evaluation.report_figures import _compact_path, compact_svg
from fwlora.experiment.evaluation.verdicts import Finding

CLAIMS = load_claims(Path(__file__).resolve().parents[1] / "config" / "claims")
HOSTILE = "<script>alert(\"x\")</script> & 'ü' </pre>"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
ENVIRONMENT = {
    "commit": "64a8ef9c1f6d3b2e8a7c5d4e3f2a1b0c9d8e7f6a",
    "dirty": False,
    "python": "3.11.9",
    "packages": {"torch": "2.13.0", "peft": "0.21.2"},
    "system": "Linux x86_64",
    "device": "NVIDIA H100",
    "threads": 8,
    "cpu_count": 16,
}
ORIGIN = ReportOrigin("python -m src.evaluate results_dir=results run_ids='[\"a\"]'", {**ENVIRONMENT, "dirty": True})
METHODS = {"baseline_lora": (0.13, 100.0), "adalora": (0.10, 116.0), "proposed_fw_lora": (0.11, 101.0)}
VOID = {"meta", "img", "link", "input", "br", "hr", "wbr"}


def make_run(run_id: str, method: str, seed: int, subset: str = "sst2", dirty: bool = False, **more: Any):
    error_rate, time_s = METHODS[method]
    record = make_record(run_id, method, seed, error_rate=error_rate, subset=subset, time_s=time_s, **more)
    return change(
        record,
        config__resolved__environment={**ENVIRONMENT, "dirty": dirty},
        config__resolved__command=f"python -m src.main run={run_id}",
        config__resolved__train_fingerprint=f"train-{subset}",
        summary__time_eval_s=6.25,
        summary__best_eval_accuracy=0.99,
        summary__best_eval_accuracy_epoch=2,
        summary__encoder_fingerprint="9f31c07be2d4a1f0",
    )


def make_figures(evidence: Evidence, drawing: Drawing) -> Figures:
    return Figures(
        overview={"pooled_difference": drawing},
        cells={cell.condition: {"paired_difference": drawing} for cell in evidence.cells},
        runs={run.run_id: {"learning_curve": drawing, "confusion_matrix": drawing} for run in evidence.runs},
    )


@dataclass
class Page(HTMLParser):
    """What a page holds, and whether its elements are nested as they should be."""

    text: str = ""
    elements: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    tables: dict[str, list[list[tuple[str, str | None]]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self._open: list[str] = []
        self._table = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        assert len(given) == len(attrs), (tag, attrs)
        self.elements.append((tag, given))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self._table = given.get("id", f"table {len(self.tables)}")
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in ("td", "th"):
            self.tables[self._table][-1].append(("", given.get("data-value")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        self.text += data
        if "td" in self._open or "th" in self._open:
            text, value = self.tables[self._table][-1].pop()
            self.tables[self._table][-1].append((text + data, value))

    def column(self, table: str, place: int) -> list[tuple[str, str | None]]:
        return [(" ".join(row[place][0].split()), row[place][1]) for row in self.tables[table][1:]]

    def all(self, *tags: str) -> list[dict[str, str]]:
        return [given for tag, given in self.elements if tag in tags]


def parse(html: bytes) -> Page:
    page = Page()
    page.feed(html.decode())
    page.close()
    assert not page._open
    return page


@pytest.fixture(scope="module")
def drawing() -> Drawing:
    def draw(figure: Any) -> None:
        curve, heat_map = figure.subplots(1, 2)
        curve.plot([0.0, 1.0, 2.0], [0.1, 0.7, 0.3], marker="o")
        curve.set_title("a < b")
        figure.colorbar(heat_map.pcolormesh([[1.0, 2.0], [3.0, 4.5]]), ax=heat_map)

    return figure_style.render(draw, 4.0, 3.0, "A curve")


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    """Two data sets, three methods, two seeds; texts that would break a page that does not escape them."""
    runs = [
        make_run(f"{method}-{subset}-110M--seed {seed}", method, seed, subset, dirty=(method, seed) == ("adalora", 2))
        for subset in ("sst2", "cola")
        for seed in (1, 2)
        for method in METHODS
    ]
    runs[0] = change(runs[0], config__resolved__command=HOSTILE, summary__params_adapter_final=200_000)
    hostile = CLAIMS["above-lora"].model_copy(update={"statement": HOSTILE, "quote": HOSTILE})
    found = gather_evidence(runs, {**CLAIMS, "above-lora": hostile}, resamples=200)
    return replace(found, warnings=[*found.warnings, HOSTILE])


@pytest.fixture(scope="module")
def html(evidence: Evidence, drawing: Drawing) -> bytes:
    return render_report(evidence, make_figures(evidence, drawing), ORIGIN)


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
    assert order == ["verdicts", "warnings", "methods", "differences", "figures", "runs", "provenance"]


def test_every_claim_warning_and_run_is_there(page: Page, evidence: Evidence):
    text = page.text
    for answer in evidence.answers:
        assert report.typeset(answer.claim.statement) in text
        assert answer.claim.quote in text
        for finding in answer.findings:
            assert report._format_finding(answer, finding) in text
    tally = re.search(r"(\d+) supported\s+(\d+) refuted\s+(\d+) undecided", " ".join(text.split()))
    verdicts = [answer.verdict for answer in evidence.answers]
    assert tally and [int(count) for count in tally.groups()] == [
        verdicts.count(name) for name in ("supported", "refuted", "undecided")
    ]
    assert len(set(verdicts)) > 1
    for warning in evidence.warnings:
        assert report.typeset(re.sub(r"^glue/\w+, roberta-base, 0.2 %: ", "", warning)) in text
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

    pairs = evidence.statistics["pairs"]
    tests = [pair["over_seeds"][pair["primary_metric"]] for pair in pairs]
    shown = page.column("pairs-table", 2)
    assert [float(value or "") for _, value in shown] == [test["mean"] for test in tests]
    for (text, _), test in zip(shown, tests, strict=True):
        expected = f"{100 * test['mean']:+.2f} [{100 * test['low']:+.2f}, {100 * test['high']:+.2f}]"
        assert text == expected.replace("-", "−")
    holm = [float(value or "") for _, value in page.column("pairs-table", 7)]
    assert holm == [test["p_value_holm"] for test in evidence.statistics["holm"]["paired_t"]]
    ratios = [float(value or "") for _, value in page.column("pairs-table", 10)]
    assert ratios == [pair["training_time_ratio"]["ratio"] for pair in pairs]
    pooled = evidence.statistics["pooled"]
    assert [float(value or "") for _, value in page.column("pooled-table", 3)] == [entry["mean"] for entry in pooled]
    seeds = [seed["mcnemar"]["p_value"] for pair in pairs for seed in pair["per_seed"]]
    assert [float(value or "") for _, value in page.column("seeds-table", 6)] == seeds


def test_figures_are_embedded_and_their_files_named(page: Page, evidence: Evidence, drawing: Drawing, html: bytes):
    figures = make_figures(evidence, drawing)
    expected = {path.as_posix() for path in figures.files(Path("results"))}
    named = {given["href"] for given in page.all("a") if given["href"].endswith(".pdf")}
    assert {unquote(f"results/comparison/{name}").replace("comparison/../", "") for name in named} == expected
    # The matrix of a run is on its page as a table.
    assert len(page.all("img")) == 1 + 2 + 12
    embedded = base64.b64decode(page.all("img")[0]["src"].partition(",")[2]).decode()
    assert embedded == compact_svg(drawing.svg)
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
    assert "No cell has runs of FW-LoRA and of another method, so there is no difference to test." in text


def test_one_run(drawing: Drawing):
    found = gather_evidence([make_run("only", "proposed_fw_lora", 1)], CLAIMS, resamples=50)
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
    answer = next(answer for answer in evidence.answers if answer.claim_id == claim_id)
    found = Finding(cells=("c",), **finding)
    return arrange_strip(replace(answer, findings=(found,)), found)


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
    assert report.typeset("-0.30 points [-1, +2]") == "−0.30 points [−1, +2]"
    assert report.typeset("roberta-base-110M--CoLA--0 5e-05") == "roberta-base-110M--CoLA--0 5e-05"
    assert report.typeset("AdaLoRA's 80% of 0.2 %") == "AdaLoRA’s 80\u00a0% of 0.2\u00a0%"
    assert report.name_anchors("run", ["a b", "a-b", "ü", "a/b"]) == {
        "a b": "run-a-b",
        "a-b": "run-a-b-2",
        "ü": "run--",
        "a/b": "run-a-b-3",
    }


def test_reasons_are_told_once(evidence: Evidence):
    one, two = (cell.name for cell in evidence.cells)
    text = f"{one}: no runs of LoRA; of any kind; {two}: no runs of LoRA; of any kind"
    assert report.split_reasons(text, evidence.cells) == [("No runs of LoRA; of any kind", [one, two])]
    assert report.split_reasons("two seeds at least", evidence.cells) == [("Two seeds at least", [])]
    assert report.split_reasons(None, evidence.cells) == []


def test_a_compacted_figure_takes_less_text(drawing: Drawing):
    original, compact = drawing.svg.decode(), compact_svg(drawing.svg)
    assert len(compact) < 0.75 * len(original)
    assert compact.startswith("<svg ") and "metadata" not in compact
    assert _compact_path("M 1.005 2 \nL 3.14159 2 \nL 3.14159 4.5 \nL 1.005 4.5 \nz\n") == "M1 2H3.14V4.5H1z"
    assert _compact_path("M 0.25 -1.5 \nL 3.999 2 \n") == "M0.25 -1.5L4 2"


# In a browser.


@pytest.fixture(scope="module")
def address(html: bytes, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_bytes(html)
    return path.as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


@dataclass
class Opened:
    """A page in the browser, with everything that it complained of or asked for."""

    page: Any
    complaints: list[str] = field(default_factory=list)


@pytest.fixture
def opened(browser: Any, address: str) -> Iterator[Opened]:
    """Checked in the end: no errors, no warnings, no request but the file and what lies in it."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    found = Opened(page)
    page.on("console", lambda message: found.complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: found.complaints.append(f"error: {error}"))
    page.on("dialog", lambda dialog: found.complaints.append(f"dialog: {dialog.message}"))
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    yield found
    page.close()
    assert found.complaints == []
    assert {url.partition("#")[0] for url in requests if not url.startswith("data:")} == {address}


def column_values(page: Any, table: str, place: int) -> list[float | None]:
    script = f"rows => rows.map(row => row.cells[{place}].dataset.value)"
    values = page.locator(f"#{table} tbody tr").evaluate_all(script)
    return [float(value) if value else None for value in values]


def test_verdicts_come_first_and_are_seen_at_once(opened: Opened, evidence: Evidence):
    board = opened.page.locator(".board > li")
    assert board.count() == len(evidence.answers)
    assert opened.page.locator("h2").first.inner_text() == "Verdicts"
    assert board.first.bounding_box()["y"] < 500
    for place, answer in enumerate(evidence.answers):
        item = board.nth(place)
        assert item.locator(".badge").inner_text() == answer.verdict
        shape = item.locator(".badge svg").bounding_box()
        assert shape["width"] > 10 and shape["height"] > 10
        assert item.locator("svg.strip").count() == sum(finding.value is not None for finding in answer.findings)
    # Colour is not alone: every verdict has a drawing of its own.
    icons = [opened.page.locator(f"#icon-{name}").inner_html() for name in ("supported", "refuted", "undecided")]
    assert len(set(icons)) == 3


def test_headers_sort_by_number_both_ways(opened: Opened):
    page = opened.page
    for table, place in (("methods-table", 4), ("pairs-table", 2), ("pooled-table", 3)):
        header = page.locator(f"#{table} thead th").nth(place)
        values = column_values(page, table, place)
        assert header.get_attribute("aria-sort") == "none"
        header.locator("button").click()
        assert column_values(page, table, place) == sorted(values)
        assert header.get_attribute("aria-sort") == "ascending"
        header.locator("button").click()
        assert column_values(page, table, place) == sorted(values, reverse=True)
        assert header.get_attribute("aria-sort") == "descending"
        assert page.locator(f"#{table} th[aria-sort=ascending], #{table} th[aria-sort=descending]").count() == 1


def test_headers_sort_by_text_and_leave_what_is_missing_last(opened: Opened):
    page = opened.page
    page.locator("#methods-table thead th").nth(1).locator("button").click()
    names = [text.strip() for text in page.locator("#methods-table tbody th").all_inner_texts()]
    assert names == ["AdaLoRA", "AdaLoRA", "FW-LoRA", "FW-LoRA", "LoRA", "LoRA"] or names == sorted(names)
    page.locator("#methods-table tbody tr").first.locator("td").nth(3).evaluate("cell => cell.dataset.value = ''")
    header = page.locator("#methods-table thead th").nth(4).locator("button")
    for _ in range(2):
        header.click()
        values = column_values(page, "methods-table", 4)
        assert values[-1] is None and None not in values[:-1]


def test_headers_sort_by_keyboard(opened: Opened):
    page = opened.page
    values = column_values(page, "methods-table", 7)
    page.locator("#methods-table thead th").nth(6).locator("button").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert column_values(page, "methods-table", 7) == sorted(values)
    page.keyboard.press("Space")
    assert column_values(page, "methods-table", 7) == sorted(values, reverse=True)


def test_a_link_to_a_run_opens_its_page(opened: Opened, evidence: Evidence):
    page = opened.page
    assert page.locator("details.run[open]").count() == 0
    link = page.locator("#methods-table tbody tr").nth(1).locator(".links a").nth(1)
    assert link.get_attribute("title") == "adalora-cola-110M--seed 2"
    link.click()
    assert page.locator("details.run[open] .run-id").all_inner_texts() == ["adalora-cola-110M--seed 2"]
    run_page = page.locator("details.run[open]")
    assert 0 <= run_page.bounding_box()["y"] < 900
    assert run_page.locator("img").first.is_visible()
    # Closed by hand, the same link opens it again.
    run_page.locator("summary").first.click()
    assert page.locator("details.run[open]").count() == 0
    link.click()
    assert page.locator("details.run[open]").count() == 1
    page.get_by_role("button", name="Open all").click()
    assert page.locator("details.run[open]").count() == len(evidence.runs)
    page.get_by_role("button", name="Close all").click()
    assert page.locator("details.run[open]").count() == 0


def test_an_address_with_a_run_opens_its_page(opened: Opened, address: str):
    opened.page.goto("about:blank")
    opened.page.goto(f"{address}#run-proposed_fw_lora-sst2-110M--seed-1")
    assert opened.page.locator("details.run[open] .run-id").inner_text() == "proposed_fw_lora-sst2-110M--seed 1"
    opened.page.goto(f"{address}#no-such-run")


def test_all_figures_are_drawn(opened: Opened):
    page = opened.page
    page.get_by_role("button", name="Open all").click()
    script = (
        "async images => { for (const i of images) { i.loading = 'eager'; await i.decode() } return images.length }"
    )
    assert page.locator("figure img").evaluate_all(script) == 15
    assert page.locator("figure img").evaluate_all("images => images.every(i => i.naturalWidth > 100)")


def test_a_compacted_figure_looks_the_same(browser: Any, drawing: Drawing):
    page = browser.new_page()
    pictures = []
    for svg in (drawing.svg, compact_svg(drawing.svg).encode()):
        page.set_content(f'<img src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}">')
        pictures.append(np.asarray(Image.open(io.BytesIO(page.locator("img").screenshot())).convert("L"), dtype=int))
    page.close()
    assert pictures[0].std() > 20
    assert (abs(pictures[0] - pictures[1]) > 40).mean() < 1e-3


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_does_not_scroll_sideways(opened: Opened, width: int):
    page = opened.page
    page.set_viewport_size({"width": width, "height": 844})
    page.get_by_role("button", name="Open all").click()
    for details in page.locator("details").all():
        details.evaluate("each => each.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    outside = """elements => elements.filter(each => each.getBoundingClientRect().right > innerWidth + 1
        && !each.closest('.scroll, .facts, pre, .symbols')).map(each => each.outerHTML.slice(0, 80))"""
    assert page.locator("main *").evaluate_all(outside) == []


def test_commands_can_be_copied(opened: Opened, evidence: Evidence):
    commands = opened.page.locator("#commands").inner_text().split("\n")
    assert len(commands) == len(evidence.runs)
    assert HOSTILE in commands
    assert opened.page.locator(".copyable .action").count() == opened.page.locator(".copyable").count()


def test_print_holds_the_verdicts_and_no_controls(opened: Opened):
    page = opened.page
    page.emulate_media(media="print")
    assert page.locator(".board > li").first.is_visible()
    assert not page.locator("nav").is_visible()
    assert not any(button.is_visible() for button in page.locator("button.action").all())
    assert page.locator("details.run summary").first.is_visible()
    # Headers keep their texts, which are inside of buttons on the screen.
    assert "score" in page.locator("#methods-table thead").inner_text()
    printed = page.pdf(prefer_css_page_size=True)
    page.emulate_media(media="screen")
    page.get_by_role("button", name="Open all").click()
    # Pages that are open are printed.
    assert printed.startswith(b"%PDF") and len(page.pdf(prefer_css_page_size=True)) > 1.5 * len(printed)


def test_without_javascript_everything_can_still_be_read(browser: Any, address: str):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address)
    assert page.locator("#methods-table thead th").first.inner_text() == "cell"
    assert page.locator("button").count() == 0
    page.locator("details.run > summary").first.click()
    assert page.locator("details.run[open] figure img").first.is_visible()
    context.close()
