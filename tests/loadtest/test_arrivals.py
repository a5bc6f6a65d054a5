from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from loadtest.errors import LoadTestError
from loadtest.sending.arrivals import Schedule, parse_arrivals

MANY = [None] * 4000


def due(spec: str, seed: int = 0) -> np.ndarray:
    times = Schedule.draw(parse_arrivals(spec), MANY, seed).due
    assert times is not None
    return np.asarray(times)


@pytest.mark.parametrize(
    ("spec", "gaps"),
    [
        ("poisson(rate=4)", stats.expon(scale=1 / 4)),
        ("gamma(rate=4,burstiness=0.5)", stats.gamma(0.5, scale=1 / 2)),
        ("gamma(rate=4,burstiness=3)", stats.gamma(3, scale=1 / 12)),
    ],
)
def test_gaps_are_those_of_the_process(spec: str, gaps: stats.rv_continuous) -> None:
    drawn = np.diff(due(spec), prepend=0.0)
    assert stats.kstest(drawn, gaps.cdf).pvalue > 0.01
    assert drawn.mean() == pytest.approx(1 / 4, rel=0.06)


@pytest.mark.parametrize(
    "spec", ["ramp(start=1,end=20,seconds=100)", "ramp(start=9,end=2,seconds=50)"]
)
def test_a_ramp_is_a_poisson_process_in_its_own_time(spec: str) -> None:
    ramp = parse_arrivals(spec)
    start, end, seconds = (getattr(ramp, name) for name in ("start", "end", "seconds"))

    def expected(t: np.ndarray) -> np.ndarray:
        inside = np.minimum(t, seconds)
        area = start * inside + (end - start) / seconds * inside**2 / 2
        return area + end * np.maximum(0, t - seconds)

    gaps = np.diff(expected(due(spec)), prepend=0.0)
    assert stats.kstest(gaps, stats.expon().cdf).pvalue > 0.01


def test_a_constant_rate_and_a_flat_ramp() -> None:
    assert np.allclose(due("constant(rate=8)"), np.arange(4000) / 8)
    flat = due("ramp(start=5,end=5,seconds=60)")
    assert len(flat) / flat[-1] == pytest.approx(5, rel=0.06)


def test_a_trace_keeps_its_gaps_at_its_speed() -> None:
    schedule = Schedule.draw(parse_arrivals("trace(speed=2)"), [10.0, 11.0, 14.0], 0)
    assert schedule.due == (0.0, 0.5, 2.0)
    with pytest.raises(LoadTestError, match="no time stamps"):
        Schedule.draw(parse_arrivals("trace"), [None], 0)


def test_a_closed_loop_has_no_times() -> None:
    closed = parse_arrivals("closed(concurrency=8)")
    assert Schedule.draw(closed, MANY, 0) == Schedule(None, 8)
    assert Schedule.draw(closed, MANY, 0, max_concurrency=3) == Schedule(None, 3)


def test_the_seed_fixes_the_schedule_and_its_hash() -> None:
    def drawn(seed: int) -> Schedule:
        return Schedule.draw(parse_arrivals("poisson(rate=2)"), MANY, seed)

    assert drawn(1) == drawn(1)
    assert drawn(1).hash == drawn(1).hash != drawn(2).hash


@pytest.mark.parametrize(
    "spec", ["poisson(rate=0)", "closed(concurrency=0)", "burst", "gamma(rate=x)"]
)
def test_bad_arrivals_are_refused(spec: str) -> None:
    with pytest.raises(LoadTestError, match="arrivals"):
        parse_arrivals(spec)
