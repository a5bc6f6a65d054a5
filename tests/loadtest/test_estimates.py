"""Percentiles, means, and how often their intervals hold the truth."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from loadtest.measuring.estimates import PERCENTILES, Estimate, distribution, mean, mean_of, wilson


def test_percentiles_and_intervals() -> None:
    found = distribution([[float(i)] for i in range(101)])
    assert found is not None
    assert (found.count, found.p50.value, found.p90.value, found.p99.value) == (101, 50, 90, 99)
    assert found.p50.low is not None
    assert found.p50.high is not None
    assert 35 < found.p50.low < 50 < found.p50.high < 65
    assert distribution([]) is None
    assert mean([]) is None
    single = mean([3.0])
    assert single is not None
    assert (single.value, single.low) == (3.0, None)


def test_an_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        found = mean(list(rng.normal(5, 2, 40)))
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 5 <= found.high
    assert 0.88 < held / 200 <= 0.99


def test_gaps_of_one_request_are_drawn_together() -> None:
    # one slow request of many gaps: resampling gaps would make its share look certain
    groups = [[0.1] * 50] * 9 + [[1.0] * 50]
    found = distribution(groups)
    assert found is not None
    assert found.mean.low is not None
    assert found.mean.low == pytest.approx(0.1)


@pytest.mark.parametrize(("share", "count"), [(50, 40), (90, 40), (95, 100), (99, 400)])
def test_a_percentiles_interval_holds_the_truth_too(share: int, count: int) -> None:
    """Of a skewed distribution, as latencies are."""
    rng = np.random.default_rng(0)
    truth = -np.log(1 - share / 100)
    held = 0
    for _ in range(200):
        found = distribution([[v] for v in rng.exponential(size=count)])
        assert found is not None
        estimate = getattr(found, f"p{share}")
        assert estimate.low is not None
        held += estimate.low <= truth <= estimate.high
    assert 0.88 < held / 200 <= 1


def test_a_percentile_of_too_few_values_has_no_bounds() -> None:
    """With 24 requests the largest is mostly below the 99th percentile: no bound holds it."""
    found = distribution([[float(i)] for i in range(24)])
    assert found is not None
    bounded = [p for p in PERCENTILES if getattr(found, f"p{p}").low is not None]
    assert bounded == [50]
    assert found.mean.low is not None


@pytest.mark.parametrize("truth", [0.05, 0.5, 0.9, 0.98])
def test_an_interval_of_hits_holds_the_truth(truth: float) -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        found = mean([float(hit) for hit in rng.random(12) < truth])
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        held += found.low <= truth <= found.high
    assert held / 400 > 0.9


def test_all_hits_are_no_certainty() -> None:
    found = mean([1.0] * 12)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((0.757, 1.0), abs=1e-3)
    assert wilson(0.0, 12) == pytest.approx((0.0, 0.243), abs=1e-3)
    # half points that are all alike are no shares, but no certainty either
    half = mean([0.5] * 4)
    assert half is not None
    assert half.low is not None
    assert half.low < 0.25
    beyond = mean([7.0, 7.0])
    assert beyond is not None
    assert (beyond.low, beyond.high) == (7.0, 7.0)


def test_an_interval_of_several_tasks_holds_the_mean_of_their_truths() -> None:
    rng = np.random.default_rng(0)
    truths, held = (0.95, 0.5, 1.0), 0
    for _ in range(300):
        parts = [mean([float(x) for x in rng.random(10) < truth]) for truth in truths]
        known = [part for part in parts if part is not None]
        low, high = mean_of(known, [10, 10, 10])
        held += low <= sum(truths) / 3 <= high
    assert held / 300 > 0.9
    low, high = mean_of([Estimate(value=1.0)], [1])
    assert (low, high) == pytest.approx((0.207, 1.0), abs=1e-3)


def test_what_is_drawn_does_not_depend_on_how_values_are_grouped() -> None:
    values = [float(v) for v in itertools.accumulate(range(60))]
    single = distribution([[v] for v in values])
    doubled = distribution([[v, v] for v in values])
    assert single is not None
    assert doubled is not None
    assert single.mean == doubled.mean
