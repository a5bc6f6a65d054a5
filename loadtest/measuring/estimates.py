"""Percentiles, means and their bootstrap confidence intervals."""

from __future__ import annotations

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
SEED = 0


class Estimate(BaseModel):
    """A number with the bounds of its 95 % bootstrap interval (None with fewer than two values)."""

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


def _statistics(values: Array) -> Array:
    """Mean and percentiles over the last axis: ``[..., n]`` to ``[1 + percentiles, ...]``."""
    percentiles = np.percentile(values, PERCENTILES, axis=-1)
    return np.concatenate((values.mean(axis=-1)[None], percentiles))


def _resampled(groups: Sequence[Array]) -> Array:
    """Statistics of ``RESAMPLES`` drawings of whole groups: ``[statistics, resamples]``."""
    picks = np.random.default_rng(SEED).integers(len(groups), size=(RESAMPLES, len(groups)))
    if all(len(g) == 1 for g in groups):
        return _statistics(np.concatenate(groups)[picks])
    # Values are sorted once; a drawing only changes how often each of them counts.
    values = np.concatenate(groups)
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    owner = np.repeat(np.arange(len(groups)), [len(g) for g in groups])[order]
    drawn = (np.bincount(pick, minlength=len(groups)) for pick in picks)
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
    values = _statistics(np.concatenate(arrays))
    estimates = [Estimate(value=float(v)) for v in values]
    if len(arrays) > 1:
        tail = (100 - CONFIDENCE) / 2
        bounds = np.percentile(_resampled(arrays), (tail, 100 - tail), axis=1)
        for found, low, high in zip(estimates, *bounds, strict=True):
            found.low, found.high = float(low), float(high)
    names = ("mean", *(f"p{p}" for p in PERCENTILES))
    count = sum(len(a) for a in arrays)
    return Distribution(count=count, **dict(zip(names, estimates, strict=True)))


def mean(values: Sequence[float]) -> Estimate | None:
    """Mean with its interval; None of nothing."""
    found = distribution([[v] for v in values])
    return found.mean if found else None
