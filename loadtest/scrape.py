"""Reading a server's Prometheus metrics on an interval. A failed scrape is a gap, never a 0."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import httpx
from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from loadtest.client import Client

KV_USE = "vllm:kv_cache_usage_perc"
PREEMPTIONS = "vllm:num_preemptions_total"


def sample(text: str, name: str) -> float | None:
    """Sum of a metric over its labels; None if the text does not hold it."""
    found = [
        s.value for f in text_string_to_metric_families(text) for s in f.samples if s.name == name
    ]
    return sum(found) if found else None


def labels(text: str, name: str) -> Mapping[str, str]:
    """Labels of the first sample of an info metric.

    Raises:
        KeyError: the text does not hold it.

    """
    for family in text_string_to_metric_families(text):
        for item in family.samples:
            if item.name == name:
                return dict(item.labels)
    raise KeyError(name)


@asynccontextmanager
async def watch_peak(
    client: Client, name: str, interval: float = 0.25
) -> AsyncIterator[list[float]]:
    """Collect a gauge while the block runs; the list holds what could be read."""
    seen: list[float] = []

    async def loop() -> None:
        while True:
            with suppress(httpx.HTTPError):
                value = sample(await client.metrics(), name)
                if value is not None:
                    seen.append(value)
            await asyncio.sleep(interval)

    task = asyncio.create_task(loop())
    try:
        yield seen
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
