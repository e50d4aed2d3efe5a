"""How often intervals hold the truth, and verdicts are wrong, where the truth is known.

    uv run python -m benchmarks.interval_coverage --repetitions 2000 --json benchmarks/results/interval_coverage.json

Runs are simulated as predictions: an example is hard or easy for both methods, and easier for one; a seed makes a run
better or worse; each prediction is right by chance, or not. The true difference is 0. Three regimes: the differences
vary over *seeds* alone, over *examples* alone, over *both*; the last two with and without a chance of each prediction's
own (*interaction*). *Collapse*: one method fails in one of eight seeds, and is better in the others by as much.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from benchmarks.common import print_table, write_json
from fwlora.experiment.evaluation.claims.claim import Claim
from fwlora.experiment.evaluation.claims.verdicts import judge_samples
from fwlora.experiment.evaluation.compare.contrasts import Sample, estimate

EXAMPLES = 300
RESAMPLES = 400
SEEDS = (2, 3, 5, 10)
COLLAPSE_RATE = 1 / 8
COLLAPSE_LOSS = 0.4
CLAIM = Claim.model_validate(
    {
        "order": 1, "statement": "the first method is better", "source": "design", "quote": "-", "measure": "quality",
        "contrast": {"proposed": 1, "lora": -1}, "at_least": 0.0, "scope": "pooled",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Regime:
    """Where differences come from.

    Attributes:
        seeds: standard deviation of a run's ability over seeds, in units of the latent scale.
        examples: standard deviation of an example's difficulty, and half of it of what favors one method.
        interaction: whether a prediction is right by a chance of its own.
        collapse: whether the first method fails in one of eight seeds.
    """

    seeds: float
    examples: float
    interaction: bool
    collapse: bool = False


REGIMES = {
    "seeds": Regime(0.35, 0.0, False),
    "examples": Regime(0.0, 1.5, False),
    "examples, interaction": Regime(0.0, 1.0, True),
    "both": Regime(0.25, 1.0, False),
    "both, interaction": Regime(0.15, 1.0, True),
    "collapse in 1 of 8": Regime(0.1, 1.0, True, collapse=True),
}


def simulate(regime: Regime, seeds: int, rng: np.random.Generator) -> Sample:
    """Simulate the difference of two accuracies in so many seeds, and on resamples of the examples."""
    if regime.seeds and not regime.examples:
        # Many examples: their variance is nothing beside that of the seeds.
        values = rng.normal(0.0, 0.02, seeds)
        rows = values[:, None] + rng.normal(0.0, 1e-5, (seeds, RESAMPLES))
        return Sample("cell", "data", "proposed - lora", tuple(range(seeds)), values, rows, EXAMPLES)
    difficulty = regime.examples * rng.normal(size=EXAMPLES)
    favor = 0.5 * regime.examples * rng.normal(size=EXAMPLES)
    ability = 0.8 + regime.seeds * rng.normal(size=(seeds, 2, 1)) + difficulty + favor * [[1], [-1]]
    right = stats.norm.cdf(ability) > (rng.random(ability.shape) if regime.interaction else 0.5)
    differences = right[:, 0].astype(float) - right[:, 1]
    if regime.collapse:
        failed = rng.random(seeds) < COLLAPSE_RATE
        # The mean over all seeds stays 0: what one of eight loses, the others gain.
        gain = COLLAPSE_LOSS * COLLAPSE_RATE / (1 - COLLAPSE_RATE)
        differences = differences + np.where(failed, -COLLAPSE_LOSS, gain)[:, None]
    counts = rng.multinomial(EXAMPLES, np.full(EXAMPLES, 1 / EXAMPLES), size=RESAMPLES) / EXAMPLES
    values = differences.mean(axis=1)
    return Sample("cell", "data", "proposed - lora", tuple(range(seeds)), values, differences @ counts.T, EXAMPLES)


def measure(regime: Regime, seeds: int, repetitions: int, seed: int) -> dict[str, float]:
    """Measure coverage of 0, the median width in points, and how often a claim of more or less than 0 is decided."""
    rng = np.random.default_rng([seed, seeds])
    covered = supported = refuted = warned = 0
    widths = []
    for _ in range(repetitions):
        sample = simulate(regime, seeds, rng)
        found = estimate([sample])
        assert found.low is not None and found.high is not None
        covered += found.low <= 0.0 <= found.high
        widths.append(100 * (found.high - found.low))
        finding = judge_samples(CLAIM, [sample])
        supported += finding.verdict == "supported"
        refuted += finding.verdict == "refuted"
        warned += finding.caveat is not None
    decided = supported + refuted
    return {
        "coverage": covered / repetitions,
        "coverage_error": math.sqrt(covered / repetitions * (1 - covered / repetitions) / repetitions),
        "median_width_points": float(np.median(widths)),
        "supported": supported / repetitions,
        "refuted": refuted / repetitions,
        "decided_with_a_caveat": warned / decided if decided else 1.0,
    }


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = {
        name: {str(seeds): measure(regime, seeds, options.repetitions, options.seed) for seeds in SEEDS}
        for name, regime in REGIMES.items()
    }
    rows = [
        [
            name, seeds, f"{one['coverage']:.3f} ± {one['coverage_error']:.3f}", f"{one['median_width_points']:.1f}",
            f"{one['supported']:.3f}", f"{one['refuted']:.3f}", f"{one['decided_with_a_caveat']:.2f}",
        ]
        for name, by_seeds in found.items()
        for seeds, one in by_seeds.items()
    ]  # fmt: skip
    header = ["regime", "seeds", "coverage", "width", "supported", "refuted", "with a caveat"]
    print_table(f"95 % intervals and verdicts, {options.repetitions} repetitions", header, rows)
    if options.json:
        settings = {
            "repetitions": options.repetitions,
            "examples": EXAMPLES,
            "resamples": RESAMPLES,
            "seed": options.seed,
        }
        write_json(options.json, torch.device("cpu"), settings, found)


if __name__ == "__main__":
    main()
