"""The HTML report opened in a real browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from fwlora.experiment.evaluation.evidence import Evidence
from tests.helpers.pages import HOSTILE

VERDICTS = ("supported", "refuted", "undecided", "does-not-apply")


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


def column_values(page: Any, table: str, index: int) -> list[float | None]:
    script = f"rows => rows.map(row => row.cells[{index}].dataset.value)"
    values = page.locator(f"#{table} tbody tr").evaluate_all(script)
    return [float(value) if value else None for value in values]


def test_scores_and_the_tally_are_seen_at_once(opened: Opened, evidence: Evidence):
    lead = opened.page.locator(".lead")
    assert lead.bounding_box()["y"] < 250 and "has the highest mean" in lead.inner_text()
    assert opened.page.locator("h2").first.inner_text() == "Scores"
    tables = opened.page.locator("table.score")
    assert tables.count() == len(evidence.cells)
    for index, cell in enumerate(evidence.cells):
        rows = tables.nth(index).locator("tr")
        assert rows.count() == len(cell.groups) + 1
        assert [row.locator("th").inner_text().strip() for row in rows.all()[:-1]] == [g.label for g in cell.groups]
    assert opened.page.locator(".tally").bounding_box()["y"] < 1000


def test_cards_of_claims_fold_and_open_where_a_link_leads(opened: Opened):
    card = opened.page.locator("details.claim").first
    assert card.get_attribute("open") is None
    opened.page.locator(".board .statement a").first.click()
    assert card.get_attribute("open") is not None and card.locator("dl").is_visible()


def test_every_verdict_has_its_line(opened: Opened, evidence: Evidence):
    board = opened.page.locator(".board > li")
    assert board.count() == len(evidence.claim_results)
    for index, result in enumerate(evidence.claim_results):
        item = board.nth(index)
        assert item.locator(".badge").inner_text() == result.verdict
        shape = item.locator(".badge svg").bounding_box()
        assert shape["width"] > 10 and shape["height"] > 10
        assert item.locator("svg.strip").count() == sum(finding.value is not None for finding in result.findings)
    # Color is not alone: every verdict has a drawing of its own.
    icons = [opened.page.locator(f"#icon-{name}").inner_html() for name in VERDICTS]
    assert len(set(icons)) == 4


def test_headers_sort_by_number_both_ways(opened: Opened):
    page = opened.page
    for table, index in (("methods-table", 4), ("pairs-table", 2), ("pooled-table", 3)):
        header = page.locator(f"#{table} thead th").nth(index)
        values = column_values(page, table, index)
        assert header.get_attribute("aria-sort") == "none"
        header.locator("button").click()
        assert column_values(page, table, index) == sorted(values)
        assert header.get_attribute("aria-sort") == "ascending"
        header.locator("button").click()
        assert column_values(page, table, index) == sorted(values, reverse=True)
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
