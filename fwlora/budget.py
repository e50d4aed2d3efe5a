"""From a parameter budget to one rank per matrix. Pure arithmetic: no torch, no randomness.

A rank-1 adapter on a matrix of shape (d_out, d_in) costs d_in + d_out parameters. A budget of a few tenths of a percent
is worth one or two ranks per matrix, so one rank for all would leave up to half of it unused: ranks here differ by at
most one, and the raised matrices are chosen so that as much of the budget as possible is used.
"""

from __future__ import annotations

import heapq
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


class BudgetError(ValueError):
    """A budget that cannot be met; the message gives the smallest one that can."""


@dataclass(frozen=True)
class MatrixShape:
    """A matrix that could get an adapter.

    Attributes:
        name: dotted module path; its numbers are read as depth, the rest as kind.
        in_features: d_in.
        out_features: d_out.
    """

    name: str
    in_features: int
    out_features: int

    @property
    def cost(self) -> int:
        """Parameters per unit of rank: d_in + d_out."""
        return self.in_features + self.out_features

    @property
    def depth(self) -> int:
        """First number in the path (the layer), 0 where there is none."""
        found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", self.name)
        return int(found.group(1)) if found else 0

    @property
    def kind(self) -> str:
        """The path without its numbers: equal for the same projection of every layer."""
        return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", self.name)


def budget_parameters(percent: float, encoder_parameters: int) -> int:
    """Return the number of parameters in ``percent`` per cent of the encoder's, rounded down.

    Raises:
        BudgetError: ``percent`` is not in (0, 100].
    """
    if isinstance(percent, bool) or not isinstance(percent, (int, float)) or not 0 < percent <= 100:
        raise BudgetError(
            f"`budget_percent` is {percent!r}; a budget is above 0 and at most 100 per cent of the encoder"
        )
    # A decimal such as 0.2 is rounded in binary: an error of 1e-9 of a parameter must not decide.
    return math.floor(percent * encoder_parameters / 100 + 1e-9)


def solve_ranks(matrices: Sequence[MatrixShape], budget: int) -> dict[str, int]:
    """Solve for ranks that differ by at most one and use as much of ``budget`` as such ranks can.

    Every matrix gets the base rank r = floor(budget / sum of costs); what remains raises some of them by one. Which
    costs are raised how often is a subset-sum problem, solved exactly; among equal sums the one nearest to raising the
    same fraction of every cost class is taken, and within a class the matrices are spread evenly over kind and depth.

    Args:
        matrices: candidates, in model order.
        budget: parameters that the adapters may have together.

    Returns:
        name -> rank, in the order given. Rank 0 means no adapter.

    Raises:
        BudgetError: no matrix, duplicate names, or not even one matrix of rank 1 fits.
    """
    names = [matrix.name for matrix in matrices]
    if not names:
        raise BudgetError("no matrix to adapt")
    if len(set(names)) < len(names):
        raise BudgetError(f"duplicate matrix names: {[name for name, n in Counter(names).items() if n > 1]}")
    smallest = min(matrix.cost for matrix in matrices)
    if budget < smallest:
        raise BudgetError(f"{budget} parameters do not pay for any rank; the cheapest matrix costs {smallest}")
    base_rank, remainder = divmod(budget, sum(matrix.cost for matrix in matrices))
    classes: dict[int, list[MatrixShape]] = defaultdict(list)
    for matrix in matrices:
        classes[matrix.cost].append(matrix)
    raised: set[str] = set()
    for cost, count in _most_costly_counts({c: len(group) for c, group in classes.items()}, remainder).items():
        raised.update(_spread(classes[cost], count))
    return {name: base_rank + (name in raised) for name in names}


def reallocate_ranks(
    matrices: Sequence[MatrixShape], importances: Mapping[str, float], budget: int, caps: Mapping[str, int]
) -> dict[str, int]:
    """Share parameters out in proportion to importance, within a budget.

    Highest averages (D'Hondt): the next unit of rank goes to the matrix with the largest
    I_m / ((r_m + 1) (d_in + d_out)) among those below their cap that the rest of the budget pays for, ties in the order
    given; when it ends, no further unit fits. Without caps a matrix ends with about budget x I_m / sum(I) parameters.

    Args:
        matrices: candidates.
        importances: I_m >= 0 by name; only proportions count.
        budget: parameters that the adapters may have together.
        caps: most units of rank by name.

    Returns:
        name -> rank, in the order given; 0 where a matrix gets none.

    Raises:
        BudgetError: the budget pays for no rank, or no importance is above 0.
    """
    shares = [importances[matrix.name] for matrix in matrices]
    if not all(math.isfinite(share) and share >= 0 for share in shares) or not any(shares):
        raise BudgetError("importances have to be finite, at least 0, and not all of them 0")
    ranks = {matrix.name: 0 for matrix in matrices}
    waiting = [
        (-share / matrix.cost, place) for place, (share, matrix) in enumerate(zip(shares, matrices, strict=True))
    ]
    heapq.heapify(waiting)
    remaining = budget
    while waiting:
        _, place = heapq.heappop(waiting)
        matrix = matrices[place]
        # A unit that does not fit now never will: the remainder only shrinks.
        if matrix.cost > remaining or ranks[matrix.name] >= caps[matrix.name]:
            continue
        ranks[matrix.name] += 1
        remaining -= matrix.cost
        heapq.heappush(waiting, (-shares[place] / (matrix.cost * (ranks[matrix.name] + 1)), place))
    if not any(ranks.values()):
        smallest = min(matrix.cost for matrix in matrices)
        raise BudgetError(f"{budget} parameters do not pay for any rank; the cheapest matrix costs {smallest}")
    return ranks


def adapter_cost(matrices: Sequence[MatrixShape], ranks: Mapping[str, int]) -> int:
    """Count the parameters of LoRA adapters with these ranks: sum of r_m (d_in + d_out)."""
    return sum(matrix.cost * ranks.get(matrix.name, 0) for matrix in matrices)


def _most_costly_counts(class_sizes: Mapping[int, int], limit: int) -> dict[int, int]:
    """Choose how many of each cost to take so that their sum is the largest not above ``limit``."""
    divisor = math.gcd(*class_sizes)
    limit //= divisor
    costs = sorted(class_sizes, reverse=True)
    mask = (1 << (limit + 1)) - 1
    # reachable[i] has bit s set iff the classes from i on can sum to s (in units of the divisor).
    reachable = [1]
    for cost in reversed(costs):
        bits = reachable[-1]
        for _ in range(class_sizes[cost]):
            bits |= (bits << (cost // divisor)) & mask
        reachable.append(bits)
    reachable.reverse()
    total = reachable[0].bit_length() - 1
    fraction = total * divisor / sum(cost * size for cost, size in class_sizes.items())
    counts: dict[int, int] = {}
    for index, cost in enumerate(costs):
        ideal = fraction * class_sizes[cost]
        for count in sorted(range(class_sizes[cost] + 1), key=lambda n: (abs(n - ideal), n)):
            rest = total - count * (cost // divisor)
            if rest >= 0 and reachable[index + 1] >> rest & 1:
                counts[cost], total = count, rest
                break
    return counts


def _spread(group: Sequence[MatrixShape], count: int) -> list[str]:
    """Pick ``count`` names of one cost class: equally many of each kind, evenly over the depth.

    Pick i of kind j lies at fraction (i + (j + 1/2) / kinds) / picks of the depth, so that the kinds interleave instead
    of all favoring the same layers.
    """
    kinds: dict[str, list[MatrixShape]] = defaultdict(list)
    for matrix in group:
        kinds[matrix.kind].append(matrix)
    picks = dict.fromkeys(kinds, 0)
    for _ in range(count):
        least_served = min((kind for kind in kinds if picks[kind] < len(kinds[kind])), key=lambda kind: picks[kind])
        picks[least_served] += 1
    names: list[str] = []
    for order, (kind, members) in enumerate(kinds.items()):
        by_depth = sorted(members, key=lambda matrix: matrix.depth)
        offset = (order + 0.5) / len(kinds)
        names += [by_depth[int((i + offset) * len(by_depth) / picks[kind])].name for i in range(picks[kind])]
    return names
