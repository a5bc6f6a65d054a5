"""What the scraped metrics say of a run, and whether they agree with the client."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from pydantic import BaseModel

from loadtest.measuring import scrape
from loadtest.sending.records import OK

if TYPE_CHECKING:
    from loadtest.measuring.scrape import Sample
    from loadtest.sending.records import Record


class ServerSide(BaseModel):
    """Metrics of the server over the run; None where it has no such metric.

    Attributes:
        scrapes, failed_scrapes: readings; a failed one is a gap.
        capacity_tokens: tokens the pool holds, as vLLM says.
        kv_use_peak, kv_use_mean: share of the pool in use; the mean is over time.
        running_mean, waiting_peak: requests.
        requests_that_fit: requests like these that would fill the pool: running requests over
            the share they use, both summed over time. Counts prompts still being read, too.
        preemptions: during the run.
        prefix_hit_share: prompt tokens found in the prefix cache.
        rss_peak, cpu_seconds: of the process tree, if a pid was given.
        kvthrift: last value of each ``kvthrift_*`` metric.

    """

    scrapes: int
    failed_scrapes: int
    capacity_tokens: int | None
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


def series(samples: list[Sample], name: str) -> list[tuple[float, float]]:
    """Time and value, summed over labels and sources that were read together."""
    by_round: dict[tuple[str, float], float] = {}
    for s in samples:
        if s.name == name:
            by_round[s.source, s.time] = by_round.get((s.source, s.time), 0.0) + s.value
    sources = {source for source, _ in by_round}
    if len(sources) < 2:
        return [(t, v) for (_, t), v in sorted(by_round.items(), key=lambda x: x[0][1])]
    last: dict[str, float] = {}
    merged = []
    for (source, t), v in sorted(by_round.items(), key=lambda x: x[0][1]):
        last[source] = v
        if len(last) == len(sources):
            merged.append((t, sum(last.values())))
    return merged


def _over_time(points: list[tuple[float, float]]) -> float | None:
    """Mean over time, each value holding until the next."""
    seconds = points[-1][0] - points[0][0] if points else 0.0
    if seconds <= 0:
        return None
    return sum((b[0] - a[0]) * a[1] for a, b in pairwise(points)) / seconds


def _peak(points: list[tuple[float, float]]) -> float | None:
    return max((v for _, v in points), default=None)


def _grown(samples: list[Sample], name: str) -> float | None:
    points = series(samples, name)
    return points[-1][1] - points[0][1] if len(points) > 1 else None


def server_side(samples: list[Sample], failed: int = 0) -> ServerSide | None:
    """Summary of the samples; None if there are none."""
    if not samples:
        return None
    use = series(samples, scrape.KV_USE)
    running = series(samples, scrape.RUNNING)
    servers = len({s.source for s in samples if s.name == scrape.KV_USE})
    use = [(t, v / max(1, servers)) for t, v in use]
    use_mean, running_mean = _over_time(use), _over_time(running)
    queries, hits = (_grown(samples, n) for n in (scrape.PREFIX_QUERIES, scrape.PREFIX_HITS))
    config = [s.labels for s in samples if s.name == scrape.CACHE_CONFIG]
    tokens = config[-1].get("kv_cache_size_tokens") if config else None
    return ServerSide(
        scrapes=len({(s.source, s.time) for s in samples}),
        failed_scrapes=failed,
        capacity_tokens=int(tokens) if tokens and tokens.isdigit() else None,
        kv_use_peak=_peak(use),
        kv_use_mean=use_mean,
        running_mean=running_mean,
        waiting_peak=_peak(series(samples, scrape.WAITING)),
        requests_that_fit=running_mean / use_mean if running_mean and use_mean else None,
        preemptions=_grown(samples, scrape.PREEMPTIONS),
        prefix_hit_share=hits / queries if hits is not None and queries else None,
        rss_peak=_peak(series(samples, scrape.RSS)),
        cpu_seconds=_grown(samples, scrape.CPU),
        kvthrift={
            name: points[-1][1]
            for name in sorted({s.name for s in samples if s.name.startswith("kvthrift_")})
            if (points := series(samples, name))
        },
    )


def check_counters(records: list[Record], samples: list[Sample]) -> list[Check]:
    """Compare the growth of the server's counters with what the client counted.

    After failed or cancelled requests the server has counted tokens that never arrived: then
    nothing is compared.
    """
    good = [r for r in records if r.status == OK]
    comparable = len(good) == len(records)
    ours = {
        scrape.PROMPT_TOKENS: sum(r.prompt_tokens or 0 for r in good),
        scrape.OUTPUT_TOKENS: sum(r.output_tokens or 0 for r in good),
        scrape.SUCCESSES: len(good),
    }
    found = []
    for name, count in ours.items():
        grown = _grown(samples, name)
        if grown is not None:
            agree = grown == count if comparable else None
            found.append(Check(name=name, server=grown, client=count, agree=agree))
    return found
