"""What becomes of samples: medians, quantiles, spreads. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


def quantile(samples: Sequence[float], share: float) -> float:
    """Return the nearest-rank quantile of samples in any order; NaN for none."""
    if not samples:
        return math.nan
    ranked = sorted(samples)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)]


def median(samples: Sequence[float]) -> float:
    """Return the middle sample, or the mean of the two in the middle; NaN for none."""
    if not samples:
        return math.nan
    ranked = sorted(samples)
    half = len(ranked) // 2
    return ranked[half] if len(ranked) % 2 else (ranked[half - 1] + ranked[half]) / 2


@dataclass(frozen=True, slots=True)
class Summary:
    """Rounds of one figure."""

    median: float
    low: float
    high: float
    rounds: int

    @property
    def spread(self) -> float:
        """The distance from lowest to highest, as a share of the median; 0 for one round."""
        return (self.high - self.low) / self.median if self.median else 0.0


def summarise(samples: Sequence[float]) -> Summary | None:
    """Summarise the rounds of a figure; ``None`` if there are none."""
    kept = [sample for sample in samples if not math.isnan(sample)]
    if not kept:
        return None
    return Summary(median(kept), min(kept), max(kept), len(kept))
