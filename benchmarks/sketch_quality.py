"""How well `sketch` and `adapter` reproduce `exact` on real training: CoLA, MiniLM, LoRA r = 8.

    uv run python -m benchmarks.sketch_quality --glue FOLDER [--json PATH] [--steps 200] [--seeds 5]

One model is trained per seed while all estimators watch the same steps. Reported at the end of the warm-up: Spearman's
rank correlation with exact over the matrices, the median relative error of the importances, and the ratio of the sums
of F (the scale). `every n` measures at every n-th step, with beta^n. FOLDER holds GLUE
in the Hub's layout; `glue` fetches it from the Hub.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from scipy import stats
from torch import nn

from benchmarks.common import load_minilm, make_lora, print_table, write_json
from benchmarks.glue_data import load_sentences
from fwlora import FisherWeighting
from fwlora.adapters import find_adapter_pairs
from fwlora.estimators import AdapterEstimator, ExactEstimator, GradientEstimator, SketchEstimator
from fwlora.importance import FisherAccumulator, normalize_importance

DEFAULT = FisherWeighting()
SIZES = (1, 4, 8, 16)
SPARSE = (2, 3, 4)
TARGET_SPEARMAN = 0.98


def watch_training(seed: int, glue: str, steps: int, batch_size: int, learning_rate: float) -> dict[str, np.ndarray]:
    """F by estimator, shape (matrices,), after ``steps`` optimizer steps."""
    torch.manual_seed(seed)
    model = make_lora(load_minilm, 8, torch.device("cpu")).train()
    pairs = find_adapter_pairs(model)
    estimators: dict[str, GradientEstimator] = {"exact": ExactEstimator(pairs), "adapter": AdapterEstimator(pairs)}
    estimators |= {f"sketch, k = {size}": SketchEstimator(pairs, size, seed) for size in SIZES}
    schedules = [(name, 1) for name in estimators]
    schedules += [(name, every) for name in ("exact", f"sketch, k = {DEFAULT.sketch_size}") for every in SPARSE]
    fishers = {schedule: FisherAccumulator(len(pairs), DEFAULT.decay ** schedule[1]) for schedule in schedules}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    batches = load_sentences(glue, "cola", batch_size, steps, seed)
    for step, (inputs, labels) in enumerate(track(batches, description=f"seed {seed}"), start=1):
        for estimator in estimators.values():
            estimator.start(step)
        nn.functional.cross_entropy(model(**inputs).logits, labels).backward()
        norms = {name: estimator.take_squared_norms() for name, estimator in estimators.items()}
        for (name, every), fisher in fishers.items():
            if (step - 1) % every == 0:
                fisher.update(norms[name])
        optimizer.step()
        optimizer.zero_grad()
    return {
        name if every == 1 else f"{name}, every {every}": fisher.values.double().numpy()
        for (name, every), fisher in fishers.items()
    }


def compare(exact: np.ndarray, estimate: np.ndarray) -> dict[str, float]:
    """Rank correlation, median relative error of I, and the scale of F against the exact one."""
    of_exact, of_estimate = (normalize_importance(torch.from_numpy(F)).numpy() for F in (exact, estimate))
    return {
        "spearman": float(stats.spearmanr(exact, estimate).statistic),
        "median_importance_error": float(np.median(np.abs(of_estimate / of_exact - 1))),
        "scale": float(estimate.sum() / exact.sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glue", required=True, help="a folder with GLUE in the Hub's layout, or `glue`")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    importances = []
    for seed in range(1, arguments.seeds + 1):
        fishers = watch_training(seed, arguments.glue, arguments.steps, arguments.batch_size, arguments.learning_rate)
        importances.append(normalize_importance(torch.from_numpy(fishers["exact"])).numpy())
        for name, values in fishers.items():
            if name != "exact":
                found[name].append(compare(fishers["exact"], values))
    rows = [
        [
            name,
            *(
                f"{np.median(values):.4f} ({np.min(values):.4f} .. {np.max(values):.4f})"
                for key in ("spearman", "median_importance_error", "scale")
                for values in [[run[key] for run in runs]]
            ),
        ]
        for name, runs in found.items()
    ]
    print_table(
        f"MiniLM, CoLA, {arguments.steps} steps, {len(importances[0])} matrices, {arguments.seeds} seeds: "
        "median (range)",
        ["estimator", "Spearman with exact", "median error of I", "sum F / exact"],
        rows,
    )
    pooled = np.stack(importances)
    print(
        f"exact I = F / sum F: median {np.median(pooled):.4f}, largest {pooled.max():.4f}, "
        f"so 1 - I is at least {1 - pooled.max():.4f}"
    )
    print(f"target: Spearman of the sketch (k = {DEFAULT.sketch_size}, every step) >= {TARGET_SPEARMAN}")
    if arguments.json:
        settings = {key: str(value) for key, value in vars(arguments).items() if key not in ("json", "glue")}
        results = {"estimators": found, "exact_importances": pooled.tolist()}
        write_json(arguments.json, torch.device("cpu"), settings, results)


if __name__ == "__main__":
    main()
