"""What the scraped metrics say of a run, and whether they agree with the client."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from pydantic import BaseModel

from loadtest.measuring import scrape
from loadtest.measuring.series import (
    POOL_BYTES,
    by_name,
    increase,
    is_ratio,
    pool_bytes,
    pools,
    restarts,
    series,
)
from loadtest.sending.records import OK

if TYPE_CHECKING:
    from collections.abc import Callable

    from loadtest.measuring.scrape import Sample
    from loadtest.sending.records import Record


class ServerSide(BaseModel):
    """Metrics of the server over the run; None where it has no such metric.

    Attributes:
        scrapes, failed_scrapes: readings; a failed one is a gap.
        restarts: times at which counters fell between two readings.
        capacity_tokens: tokens the pools of all engines hold, as vLLM says.
        capacity_bytes: bytes of the pools.
        bytes_per_request: of them, by ``requests_that_fit``: cache memory of a request like these.
        kv_use_peak, kv_use_mean: share of the pools in use; the mean is over time.
        running_mean, waiting_peak: requests.
        requests_that_fit: requests like these that would fill the pool: running requests over
            the share they use, both summed over time. Counts prompts still being read, too.
        preemptions: during the run.
        prefix_hit_share: prompt tokens found in the prefix cache.
        rss_peak, cpu_seconds: of the process tree, if a pid was given.
        kvthrift: of each ``kvthrift_*`` metric the growth of a counter, the last value of a gauge.

    """

    scrapes: int
    failed_scrapes: int
    restarts: int = 0
    capacity_tokens: int | None
    capacity_bytes: int | None = None
    bytes_per_request: float | None = None
    kv_use_peak: float | None
    kv_use_mean: float | None
    running_mean: float | None
    waiting_peak: float | None
    requests_that_fit: float | None
    preemptions: float | None
    prefix_hit_share: float | None
    rss_peak: float | None
    cpu_seconds: float | None
    kvthrift: dict[str, float]


class Check(BaseModel):
    """A counter of the server beside the client's own count. ``agree`` is None if not compared."""

    name: str
    server: float
    client: float
    agree: bool | None


def _over_time(points: list[tuple[float, float]]) -> float | None:
    """Mean over time, each value holding until the next."""
    seconds = points[-1][0] - points[0][0] if points else 0.0
    if seconds <= 0:
        return None
    return sum((b[0] - a[0]) * a[1] for a, b in pairwise(points)) / seconds


def _peak(points: list[tuple[float, float]]) -> float | None:
    return max((v for _, v in points), default=None)


def server_side(samples: list[Sample], failed: int = 0) -> ServerSide | None:
    """Summary of the samples; None if there are none."""
    if not samples:
        return None
    named = by_name(samples)
    config = named.get(scrape.CACHE_CONFIG, []) + named.get(POOL_BYTES, [])

    def levels(name: str) -> list[tuple[float, float]]:
        return series([*named.get(name, []), *(config if is_ratio(name) else ())], name)

    use, running = levels(scrape.KV_USE), levels(scrape.RUNNING)
    use_mean, running_mean = _over_time(use), _over_time(running)
    fit = running_mean / use_mean if running_mean and use_mean else None
    size = pool_bytes(config)
    queries, hits = (increase(samples, n) for n in (scrape.PREFIX_QUERIES, scrape.PREFIX_HITS))
    return ServerSide(
        scrapes=len({(s.source, s.time) for s in samples}),
        failed_scrapes=failed,
        restarts=restarts(samples),
        capacity_tokens=sum(pools(config).values()) or None,
        capacity_bytes=size,
        bytes_per_request=size / fit if size and fit else None,
        kv_use_peak=_peak(use),
        kv_use_mean=use_mean,
        running_mean=running_mean,
        waiting_peak=_peak(levels(scrape.WAITING)),
        requests_that_fit=fit,
        preemptions=increase(samples, scrape.PREEMPTIONS),
        prefix_hit_share=hits / queries if hits is not None and queries else None,
        rss_peak=_peak(levels(scrape.RSS)),
        cpu_seconds=increase(samples, scrape.CPU),
        kvthrift=_ours(samples, named, levels),
    )


def _ours(
    samples: list[Sample],
    named: dict[str, list[Sample]],
    levels: Callable[[str], list[tuple[float, float]]],
) -> dict[str, float]:
    """What the server's own metrics came to."""
    found: dict[str, float] = {}
    for name in sorted(n for n in named if n.startswith("kvthrift_")):
        if name.endswith(("_bucket", "_created")):
            continue
        if named[name][0].grows:
            value = increase(samples, name)
        else:
            points = levels(name)
            value = points[-1][1] if points else None
        if value is not None:
            found[name] = value
    return found


def check_counters(records: list[Record], samples: list[Sample]) -> list[Check]:
    """Compare the growth of the server's counters with what the client counted.

    After failed or cancelled requests the server has counted tokens that never arrived, and after
    a restart it has forgotten some: then nothing is compared, as where requests have no count.
    """
    good = [r for r in records if r.status == OK]
    comparable = len(good) == len(records) and not restarts(samples)
    ours: dict[str, list[int | None]] = {
        scrape.PROMPT_TOKENS: [r.prompt_tokens for r in good],
        scrape.OUTPUT_TOKENS: [r.output_tokens for r in good],
        scrape.SUCCESSES: [1 for _ in good],
    }
    found = []
    for name, counts in ours.items():
        grown = increase(samples, name)
        if grown is not None:
            count = sum(c or 0 for c in counts)
            agree = grown == count if comparable and None not in counts else None
            found.append(Check(name=name, server=grown, client=count, agree=agree))
    return found
