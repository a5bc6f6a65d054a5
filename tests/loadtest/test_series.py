"""Several engines and endpoints, and servers that begin again during a run."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from loadtest.measuring import scrape
from loadtest.measuring.scrape import (
    CACHE_CONFIG,
    CPU,
    KV_USE,
    PREEMPTIONS,
    PREFIX_HITS,
    PREFIX_QUERIES,
    PROMPT_TOKENS,
    RUNNING,
    Sample,
    Scraper,
    parse_metrics,
)
from loadtest.measuring.series import increase, restarts, series
from loadtest.measuring.server_side import check_counters, server_side
from tests.loadtest.test_summary import record

RATIO = "kvthrift_kv_compression_ratio"


def sample(time: float, name: str, value: float, source: str = "a", **labels: str) -> Sample:
    return Sample(time, source, name, labels, value, scrape._grows(name, {}) or name == CPU)


def engines(*read: tuple[str, str, float, float, int | None], times: int = 3) -> list[Sample]:
    """Of each source and engine: its use, running requests, and tokens of its pool."""
    found = []
    for time in range(times):
        for source, engine, use, running, tokens in read:
            labels = {"engine": engine} if engine else {}
            found += [
                sample(time, KV_USE, use, source, **labels),
                sample(time, RUNNING, running, source, **labels),
                sample(time, RATIO, 3.1, source, **labels),
            ]
            if tokens is not None:
                size = {**labels, "kv_cache_size_tokens": str(tokens)}
                found.append(sample(time, CACHE_CONFIG, 1.0, source, **size))
    return found


@pytest.mark.parametrize(
    "where", [(("a", "0"), ("a", "1")), (("a", "0"), ("b", "0")), (("a", ""), ("b", ""))]
)
def test_ratios_of_two_engines_are_not_summed(where: tuple[tuple[str, str], ...]) -> None:
    found = server_side(engines(*((*w, 0.8, 4, 1000) for w in where)))
    assert found is not None
    assert found.kv_use_peak == pytest.approx(0.8)
    assert found.kv_use_mean == pytest.approx(0.8)
    assert found.running_mean == 8
    assert found.requests_that_fit == pytest.approx(10)
    assert found.capacity_tokens == 2000
    assert found.kvthrift == {RATIO: pytest.approx(3.1)}


def test_a_large_pool_weighs_more_than_a_small_one() -> None:
    read = engines(("a", "0", 0.8, 4, 1000), ("a", "1", 0.2, 4, 3000), ("b", "0", 1.0, 1, 4000))
    found = server_side(read)
    assert found is not None
    assert found.kv_use_peak == pytest.approx((800 + 600 + 4000) / 8000)
    assert found.capacity_tokens == 8000
    # where the bytes are known, ratios of bytes go by them
    sizes = [sample(0, "kvthrift_kv_capacity_bytes", 9e6, "a", engine="0"),
             sample(0, "kvthrift_kv_capacity_bytes", 1e6, "a", engine="1")]  # fmt: skip
    ratios = [sample(0, RATIO, 4.0, "a", engine="0"), sample(0, RATIO, 2.0, "a", engine="1")]
    assert series(sizes + ratios, RATIO) == [(0, pytest.approx(3.8))]
    assert series(sizes + ratios, "kvthrift_kv_capacity_bytes") == [(0, 1e7)]


def test_engines_whose_pools_are_not_known_weigh_alike() -> None:
    for unknown in (
        engines(("a", "0", 0.8, 4, None), ("a", "1", 0.2, 4, None)),
        engines(("a", "0", 0.8, 4, 1000), ("a", "1", 0.2, 4, None)),
        engines(("a", "0", 0.8, 4, 1000), ("b", "0", 0.2, 4, None)),
    ):
        assert series(unknown, KV_USE)[-1][1] == pytest.approx(0.5)
    # vLLM before kv_cache_size_tokens: blocks of a size
    old = [
        sample(0, CACHE_CONFIG, 1.0, num_gpu_blocks="50", block_size="16", engine="0"),
        sample(0, CACHE_CONFIG, 1.0, num_gpu_blocks="None", block_size="16", engine="1"),
    ]  # fmt: skip
    found = server_side(old)
    assert found is not None
    assert found.capacity_tokens == 800
    assert found.kv_use_peak is None


def test_an_endpoint_that_names_its_one_engine_in_one_metric_only() -> None:
    read = []
    for source, use, tokens in (("a", 0.8, 1000), ("b", 0.2, 3000)):
        read.append(sample(0, KV_USE, use, source, engine="0"))
        read.append(sample(0, CACHE_CONFIG, 1.0, source, kv_cache_size_tokens=str(tokens)))
    assert series(read, KV_USE) == [(0, pytest.approx((800 + 600) / 4000))]


def test_engines_of_one_endpoint_are_read_together() -> None:
    values = [(0, 0.0, 0.0), (1, 0.8, 0.4), (2, 0.2, 0.2)]
    read = [sample(t, KV_USE, v, engine=str(i)) for t, *both in values for i, v in enumerate(both)]
    assert series(read, KV_USE) == [(0, 0), (1, pytest.approx(0.6)), (2, pytest.approx(0.2))]


def counted(name: str, *values: float, source: str = "a", **labels: str) -> list[Sample]:
    return [sample(time, name, value, source, **labels) for time, value in enumerate(values)]


def test_a_restart_between_two_readings() -> None:
    found = server_side(counted(PREEMPTIONS, 7, 8, 0, 1))
    assert found is not None
    assert (found.preemptions, found.restarts) == (2, 1)
    twice = counted(PREEMPTIONS, 7, 8, 3, 1)
    assert (increase(twice, PREEMPTIONS), restarts(twice)) == (5, 2)
    never = counted(PREEMPTIONS, 7, 7, 9)
    assert (increase(never, PREEMPTIONS), restarts(never)) == (2, 0)
    assert increase(counted(PREEMPTIONS, 7), PREEMPTIONS) is None
    assert increase([], PREEMPTIONS) is None


def test_every_engine_and_endpoint_restarts_for_itself() -> None:
    one = counted(PREEMPTIONS, 5, 0, 2, engine="0")
    other = counted(PREEMPTIONS, 5, 9, 9, engine="1")  # hides the other's fall in a sum
    far = counted(PREEMPTIONS, 1, 1, 0, source="b")
    together = one + other + far
    assert increase(together, PREEMPTIONS) == 2 + 4 + 0
    assert restarts(together) == 2
    # an engine's restart takes all its counters back at once: it is one
    queries = counted(PREFIX_QUERIES, 100, 10, 30, engine="0")
    hits = counted(PREFIX_HITS, 50, 5, 15, engine="0")
    found = server_side(one + queries + hits)
    assert found is not None
    assert (found.restarts, found.prefix_hit_share) == (1, 15 / 30)


def test_a_counter_that_is_new_began_at_zero() -> None:
    name = "kvthrift_tokens_dropped_total"
    read = [*counted(PREEMPTIONS, 0, 0, 0), sample(1, name, 4, policy="h2o")]
    read += [sample(2, name, 6, policy="h2o"), sample(2, name, 1, policy="tova")]
    assert increase(read, name) == 7
    # an endpoint that was not there at first: what it had counted before is not the run's
    late = [sample(t, name, v, "b", policy="h2o") for t, v in ((1, 40), (2, 45))]
    assert increase(read + late, name) == 12


HISTOGRAM = """# TYPE kvthrift_step_seconds histogram
kvthrift_step_seconds_bucket{{le="1.0"}} {0}
kvthrift_step_seconds_bucket{{le="+Inf"}} {1}
kvthrift_step_seconds_count {1}
kvthrift_step_seconds_sum {2}
# TYPE kvthrift_step_seconds_created gauge
kvthrift_step_seconds_created 1.7e+09
# TYPE kvthrift_queue_count gauge
kvthrift_queue_count {3}
# TYPE kvthrift_rate_ratio gauge
kvthrift_rate_ratio NaN
"""


def test_histograms_restart_too_and_gauges_do_not() -> None:
    values = ((3, 5, 2.5, 9), (4, 7, 3.0, 1), (1, 1, 0.5, 4))
    read = [
        s
        for time, row in enumerate(values)
        for s in parse_metrics(HISTOGRAM.format(*row), scrape.USUAL, time, "a")
    ]
    found = server_side(read)
    assert found is not None
    assert found.restarts == 1
    assert found.kvthrift == {
        "kvthrift_step_seconds_count": 3, "kvthrift_step_seconds_sum": 1.0,
        "kvthrift_queue_count": 4,
    }  # fmt: skip


def test_a_process_that_ended_takes_no_seconds_away() -> None:
    rows = (
        (0, 10.0, "1"),
        (0, 5.0, "2"),
        (1, 12.0, "1"),
        (1, 6.0, "2"),
        (2, 13.0, "1"),
        (2, 0.5, "3"),
    )
    read = [sample(time, CPU, seconds, "pid 1", pid=pid) for time, seconds, pid in rows]
    found = server_side(read)
    assert found is not None
    assert (found.cpu_seconds, found.restarts) == (pytest.approx(3 + 1 + 0.5), 0)


def test_nothing_is_compared_after_a_restart_or_without_counts() -> None:
    whole = counted(PROMPT_TOKENS, 50, 150)
    (check,) = check_counters([record()], whole)
    assert (check.server, check.client, check.agree) == (100, 100, True)
    (check,) = check_counters([record()], counted(PROMPT_TOKENS, 50, 0, 100))
    assert (check.server, check.agree) == (100, None)
    (check,) = check_counters([record(prompt_tokens=None)], whole)
    assert check.agree is None


def test_a_server_without_our_gauges_has_no_values_of_them() -> None:
    found = server_side([sample(t, RUNNING, 3, engine="0") for t in range(2)])
    assert found is not None
    assert (found.running_mean, found.kvthrift) == (3, {})
    unknown = (found.kv_use_peak, found.kv_use_mean, found.requests_that_fit, found.preemptions,
               found.capacity_tokens, found.waiting_peak, found.prefix_hit_share)  # fmt: skip
    assert unknown == (None,) * 7


def test_readings_do_not_overtake_each_other() -> None:
    """An older one that came second would look like a server that began again."""
    under_way = most = 0

    async def answer(_: httpx.Request) -> httpx.Response:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.01)
        under_way -= 1
        return httpx.Response(200, text="")

    async def run() -> None:
        scraper = Scraper(["http://u/metrics"])
        await scraper.close()
        client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
        scraper._http["http://u/metrics"] = client
        await asyncio.gather(*(scraper.once() for _ in range(4)))
        await scraper.close()

    asyncio.run(run())
    assert most == 1
