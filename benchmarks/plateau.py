"""The plateau of a method: the range of learning rates around its best within two points of that score."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from fvae_lora_experiments.report.numbers import UNKNOWN, ci_half_width, signed

TOLERANCE = 0.02
"""How much worse than the best a score on the plateau may be."""
BASELINE = "LoRA"

Scores = Mapping[float, float | None]
"""The validation accuracy at each learning rate of a grid; None where a run failed."""


@dataclass(frozen=True)
class Plateau:
    """From its lowest to its highest rate."""

    low: float
    high: float
    best: float
    """The score of the best rate."""
    at_edge: bool
    """Whether it reaches an end of the grid, and may go on beyond."""

    @property
    def decades(self) -> float:
        """Its width."""
        return math.log10(self.high / self.low)


def plateau(scores: Scores) -> Plateau:
    """The contiguous rates around the best whose scores are within `TOLERANCE` of it.

    Its true ends lie up to a step of the grid further out. Among equals the lowest rate is the best.

    Raises:
        ValueError: no rate has a score.
    """
    rates = sorted(scores)
    known = [-math.inf if (score := scores[rate]) is None else score for rate in rates]
    best = max(known, default=-math.inf)
    if best == -math.inf:
        raise ValueError("no rate has a score")
    good = [score >= best - TOLERANCE - 1e-9 for score in known]  # 0.58 - 0.56 is above 0.02
    first = last = known.index(best)
    while first > 0 and good[first - 1]:
        first -= 1
    while last < len(rates) - 1 and good[last + 1]:
        last += 1
    return Plateau(rates[first], rates[last], best, first == 0 or last == len(rates) - 1)


def plateau_table(found: Mapping[str, Mapping[str, Plateau]]) -> str:
    """Widths in decades, with the best scores, and mean differences to LoRA over the data sets of both.

    Args:
        found: by method and by data set; methods with a single one are left out.
    """
    sets = list(dict.fromkeys(name for of_method in found.values() for name in of_method))
    lines = [f"| | {' | '.join(sets)} | mean | vs {BASELINE} ± 95% CI | sets |", "|---|" + "---:|" * (len(sets) + 3)]
    for method, own in found.items():
        if len(own) > 1:
            pairs = [own[name].decades - base.decades for name, base in found[BASELINE].items() if name in own]
            difference = f"{signed(f'{statistics.fmean(pairs):.2f}')} ± {ci_half_width(pairs):.2f}"
            compared = "baseline" if method == BASELINE else difference
            mean = statistics.fmean(width.decades for width in own.values())
            cells = [*(_cell(own.get(name)) for name in sets), f"{mean:.2f}", compared, str(len(own))]
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: Plateau | None) -> str:
    if found is None:
        return UNKNOWN
    return f"{'≥ ' if found.at_edge else ''}{found.decades:.1f} ({100 * found.best:.1f})"
