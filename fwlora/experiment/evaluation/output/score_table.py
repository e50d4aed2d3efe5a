"""The table of scores as papers print it: methods down, tasks or budgets across, points and their spread over seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fwlora.experiment.evaluation.compare.cells import Cell, Group

_DECIMALS = 1
NOTHING = "-"


@dataclass(frozen=True)
class Score:
    """One method's score in one column.

    Attributes:
        text: ``60.4 ± 1.2``; the mean alone for one seed; the number of seeds in brackets where it is not everywhere
            the same.
        is_best: whether no other method of the block has a higher mean, to the decimal that is shown.
    """

    text: str
    is_best: bool


@dataclass(frozen=True)
class Block:
    """Methods that compete.

    Attributes:
        name: what they have in common: a budget, or a task.
        rows: the method, and a score per column; None where it has no runs.
    """

    name: str
    rows: tuple[tuple[str, tuple[Score | None, ...]], ...]


@dataclass(frozen=True)
class ScoreTable:
    """The scores of all methods with one pretrained model.

    Attributes:
        model: its name.
        block_heading: what a block's name is.
        columns: their headings: tasks with their metric, or budgets.
        blocks: one per budget, or one of the only task.
        seeds: how many every score has; None where that differs.
    """

    model: str
    block_heading: str
    columns: tuple[str, ...]
    blocks: tuple[Block, ...]
    seeds: int | None

    @property
    def caption(self) -> str:
        """What the numbers are."""
        over = "seeds, their number in brackets" if self.seeds is None else f"{self.seeds} seeds"
        spread = "one seed" if self.seeds == 1 else f"mean ± standard deviation over {over}"
        return (
            f"{self.model}: points after the last epoch, {spread}; bold: the highest mean, whether or not a test "
            "backs it"
        )


def arrange_scores(cells: Sequence[Cell]) -> list[ScoreTable]:
    """Arrange cells in a table per pretrained model: tasks across, budgets down; budgets across if it is one task."""
    tables = []
    shown = {cell.pretrained: cell.model for cell in cells}
    for pretrained, model in shown.items():
        members = [cell for cell in cells if cell.pretrained == pretrained]
        name = model if list(shown.values()).count(model) == 1 else pretrained
        tables.append(_arrange(name, members))
    return tables


def _task(cell: Cell) -> str:
    return f"{cell.data} ({cell.display_metric(cell.primary, short=True)})"


def _budget(cell: Cell) -> str:
    return str(cell.budget)


def _arrange(model: str, cells: Sequence[Cell]) -> ScoreTable:
    by_budget = sorted(cells, key=lambda cell: (cell.budget.number, _budget(cell)))
    tasks, budgets = _distinct(_task(cell) for cell in cells), _distinct(_budget(cell) for cell in by_budget)
    counts = {len(group.runs) for cell in cells for group in cell.groups}
    seeds = counts.pop() if len(counts) == 1 else None
    heading, columns, names = ("budget", tasks, budgets) if len(tasks) > 1 else ("task", budgets, tasks)
    of_block, of_column = (_budget, _task) if len(tasks) > 1 else (_task, _budget)
    blocks = []
    for name in names:
        members = {of_column(cell): cell for cell in cells if of_block(cell) == name}
        blocks.append(Block(name, _arrange_rows([members.get(column) for column in columns], seeds is None)))
    return ScoreTable(model, heading, columns, tuple(blocks), seeds)


def _distinct(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _arrange_rows(cells: Sequence[Cell | None], with_counts: bool) -> tuple[tuple[str, tuple[Score | None, ...]], ...]:
    groups = sorted(
        (group for cell in cells if cell for group in cell.groups),
        key=lambda group: (group.is_proposed, group.is_control),
    )
    columns = [_score_methods(cell, with_counts) if cell else {} for cell in cells]
    return tuple(
        (label, tuple(column.get(label) for column in columns)) for label in _distinct(group.label for group in groups)
    )


def _score_methods(cell: Cell, with_counts: bool) -> dict[str, Score]:
    metric = cell.primary_eval_name
    means = {group.label: f"{100 * (group.mean(metric) or 0.0):.{_DECIMALS}f}" for group in cell.groups}
    best = max(map(float, means.values()))
    return {
        group.label: Score(
            format_mean(group, metric, 100, _DECIMALS) + (f" ({len(group.runs)})" if with_counts else ""),
            float(means[group.label]) == best,
        )
        for group in cell.groups
    }


def format_mean(group: Group, metric: str, factor: float = 1.0, decimals: int = 2) -> str:
    """Write a metric's mean and standard deviation over seeds: ``93.12 ± 0.35``; the mean alone for one run.

    Args:
        group: of runs.
        metric: name of the value.
        factor: that both numbers are multiplied by.
        decimals: of both numbers.
    """
    mean, deviation = group.mean(metric), group.standard_deviation(metric)
    if mean is None:
        return NOTHING
    text = f"{factor * mean:,.{decimals}f}"
    return text if deviation is None else f"{text} ± {factor * deviation:,.{decimals}f}"


def score_rows(table: ScoreTable, write: Callable[[str, bool], str]) -> tuple[list[str], list[list[list[str]]]]:
    """Return the header, and the rows of every block; a block's name is in its first row.

    Args:
        table: to be written.
        write: marks up a text, given whether it is a best score.
    """
    blocks = []
    for block in table.blocks:
        rows = []
        for place, (label, scores) in enumerate(block.rows):
            texts = [write(NOTHING, False) if score is None else write(score.text, score.is_best) for score in scores]
            rows.append([write("" if place else block.name, False), write(label, False), *texts])
        blocks.append(rows)
    return [write(text, False) for text in (table.block_heading, "method", *table.columns)], blocks
