"""Percentiles, means and their confidence intervals."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Array = NDArray[np.float64]

PERCENTILES = (50, 90, 95, 99)
RESAMPLES = 500
CONFIDENCE = 95
NORMAL = 1.959964  # of which 95 % of a normal distribution is less away from its mean
SEED = 0


class Estimate(BaseModel):
    """A number with the bounds of its 95 % interval.

    The bounds are None with fewer than two values, and for a percentile with too few to tell: of 24
    values the largest is below their distribution's 99th percentile four times in five.
    """

    value: float
    low: float | None = None
    high: float | None = None


class Distribution(BaseModel):
    """A latency in seconds.

    Attributes:
        count: values; for token gaps there are many a request.
        mean, p50, p90, p95, p99: each with its interval; requests are resampled, not gaps.

    """

    count: int
    mean: Estimate
    p50: Estimate
    p90: Estimate
    p95: Estimate
    p99: Estimate


def _resampled(groups: Sequence[Array]) -> Array:
    """Statistics of ``RESAMPLES`` drawings of whole groups: ``[statistics, resamples]``."""
    rng, count = np.random.default_rng(SEED), len(groups)
    picks = (rng.integers(count, size=count) for _ in range(RESAMPLES))
    # Values are sorted once; a drawing only changes how often each of them counts.
    values = np.concatenate(groups)
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    owner = np.repeat(np.arange(len(groups)), [len(g) for g in groups])[order]
    drawn = (np.bincount(pick, minlength=count) for pick in picks)
    return np.stack([_weighted(ordered, counts[owner]) for counts in drawn], axis=1)


def _weighted(values: Array, counts: NDArray[np.int64]) -> Array:
    """Statistics of sorted values, of which each counts so many times, as of them written out."""
    up_to = np.cumsum(counts)
    ranks = np.array(PERCENTILES) / 100 * (up_to[-1] - 1)
    below = values[np.searchsorted(up_to, np.floor(ranks), side="right")]
    above = values[np.searchsorted(up_to, np.ceil(ranks), side="right")]
    between = below + (above - below) * (ranks - np.floor(ranks))
    return np.concatenate(([values @ counts / up_to[-1]], between))


def distribution(groups: Sequence[Sequence[float]]) -> Distribution | None:
    """Mean and percentiles of the values of all groups; None if there are none.

    Args:
        groups: values of each request.

    """
    arrays = [np.asarray(g, dtype=np.float64) for g in groups if len(g)]
    if not arrays:
        return None
    everything = np.concatenate(arrays)
    values = [everything.mean(), *np.percentile(everything, PERCENTILES)]
    estimates = [Estimate(value=float(v)) for v in values]
    if len(arrays) > 1:
        tail = (100 - CONFIDENCE) / 2
        bounds = np.percentile(_resampled(arrays), (tail, 100 - tail), axis=1)
        shares = (None, *(p / 100 for p in PERCENTILES))
        for found, share, low, high in zip(estimates, shares, *bounds, strict=True):
            if share is None or _bounded(share, len(arrays)):
                found.low, found.high = float(low), float(high)
    names = ("mean", *(f"p{p}" for p in PERCENTILES))
    count = sum(len(a) for a in arrays)
    return Distribution(count=count, **dict(zip(names, estimates, strict=True)))


def _bounded(share: float, count: int) -> bool:
    """Whether values lie on both sides of a percentile, but for one drawing in forty."""
    return max(share, 1 - share) ** count <= (100 - CONFIDENCE) / 200


def mean(values: Sequence[float]) -> Estimate | None:
    """Mean of scores between 0 and 1 with its interval; None of nothing.

    Resampled, or Wilson's (1927) where they are shares of yes and no, or all the same: resampling
    could not tell ten hits of ten from certainty.
    """
    found = distribution([[v] for v in values])
    kinds = {*values}
    if found and len(values) > 1 and (kinds <= {0, 1} or (len(kinds) == 1 and 0 <= values[0] <= 1)):
        found.mean.low, found.mean.high = wilson(found.mean.value, len(values))
    return found.mean if found else None


def wilson(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share of so many, by its score test."""
    width = NORMAL**2 / count
    middle = (share + width / 2) / (1 + width)
    half = math.sqrt(share * (1 - share) * width + width**2 / 4) / (1 + width)
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_of(parts: Sequence[Estimate], counts: Sequence[int]) -> tuple[float, float]:
    """95 % interval of the mean of means, from the bounds of each (Zou and Donner 2008)."""
    away: list[tuple[float, float]] = []
    for part, count in zip(parts, counts, strict=True):
        low, high = wilson(part.value, count)  # of a single value too
        low = low if part.low is None else part.low
        high = high if part.high is None else part.high
        away.append((part.value - low, high - part.value))
    value = sum(part.value for part in parts) / len(parts)
    below, above = (math.hypot(*side) for side in zip(*away, strict=True))
    return max(0.0, value - below / len(parts)), min(1.0, value + above / len(parts))
