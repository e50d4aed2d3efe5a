from __future__ import annotations

import pytest

from fwlora.experiment.engine.progress import Progress, ProgressPrinter, format_progress, parse_progress


@pytest.mark.parametrize("progress", [Progress(40, 300, 1, 0.6123, True), Progress(1, 2, 1, float("nan"), False)])
def test_progress_lines_are_read_back(progress):
    assert str(parse_progress(format_progress(progress))) == str(progress)
    assert parse_progress("run x: step 1/2") is None


def test_progress_is_logged_now_and_then_and_at_the_end(caplog):
    caplog.set_level("INFO", "fwlora")
    ticks = iter([0.0, 1.0, 2.5, 3.0])
    printer = ProgressPrinter(lambda: next(ticks))
    for step in (1, 2, 3, 4):
        printer(Progress(step, 4, 1, 0.5, False))
    assert [line.split()[1] for line in caplog.messages] == ["1/4", "3/4", "4/4"]
