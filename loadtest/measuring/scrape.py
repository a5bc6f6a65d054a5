"""Reading Prometheus text endpoints on an interval. A failed scrape is a gap, never a 0."""

from __future__ import annotations

import asyncio
import csv
import json
import math
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx
import psutil

from loadtest.connect import connection
from loadtest.errors import CANNOT_WRITE, LoadTestError
from loadtest.hide import public_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

KV_USE = "vllm:kv_cache_usage_perc"
RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
PREEMPTIONS = "vllm:num_preemptions_total"
PROMPT_TOKENS = "vllm:prompt_tokens_total"
OUTPUT_TOKENS = "vllm:generation_tokens_total"
SUCCESSES = "vllm:request_success_total"
PREFIX_QUERIES = "vllm:prefix_cache_queries_total"
PREFIX_HITS = "vllm:prefix_cache_hits_total"
CACHE_CONFIG = "vllm:cache_config_info"
RSS = "process_tree_resident_memory_bytes"
CPU = "process_tree_cpu_seconds_total"
USUAL = "|".join(
    (KV_USE, RUNNING, WAITING, PREEMPTIONS, PROMPT_TOKENS, OUTPUT_TOKENS, SUCCESSES,
     PREFIX_QUERIES, PREFIX_HITS, CACHE_CONFIG, "kvthrift_.*")
)  # fmt: skip

COUNTED = ("total", "bucket", "count", "sum")
_TYPE = re.compile(r"^# TYPE (\S+) (\w+)", re.MULTILINE)


@dataclass(frozen=True)
class Sample:
    """One value.

    Attributes:
        time: seconds since the start of the run.
        source: URL it was read from, or ``pid N``.
        name, labels, value: as the endpoint said.
        grows: whether it counts up: a counter, or a part of a histogram or summary.

    """

    time: float
    source: str
    name: str
    labels: Mapping[str, str]
    value: float
    grows: bool = False


def parse_metrics(text: str, names: str, when: float, source: str) -> list[Sample]:
    """Samples of the metrics whose whole name matches a regular expression."""
    # prometheus_client decides at its import whether this process shares its metrics with others,
    # and `kvthrift serve` sets that after this module is imported
    from prometheus_client.parser import text_string_to_metric_families

    # Cut down first: vLLM's text is long, histograms above all, and parsing it takes long enough
    # to be seen in the token times of a client that shares the processor.
    wanted = re.compile(rf"({names})[ {{]")
    kept = "\n".join(line for line in text.splitlines() if wanted.match(line))
    kinds = dict(_TYPE.findall(text))
    return [
        Sample(when, source, s.name, s.labels, s.value, _grows(s.name, kinds))
        for family in text_string_to_metric_families(kept + "\n")
        for s in family.samples
        if not math.isnan(s.value)
    ]


def _grows(name: str, kinds: Mapping[str, str]) -> bool:
    """Whether a sample counts up, by its metric's declared type, or by its name without one."""
    family, _, suffix = name.rpartition("_")
    kind = kinds.get(name) or (kinds.get(family) if suffix in COUNTED else None)
    if kind is None:
        return suffix in ("total", "bucket")
    # a quantile of a summary is a level
    return kind == "counter" or (kind in ("histogram", "summary") and suffix in COUNTED)


def total(samples: list[Sample], name: str) -> float | None:
    """Sum over labels and sources; None if there is no such sample."""
    found = [s.value for s in samples if s.name == name]
    return sum(found) if found else None


class Scraper:
    """Reads endpoints, and a process tree, into samples.

    Args:
        urls: metrics endpoints.
        now: seconds since the start of the run.
        names: regular expression of wanted names.
        pid: process whose tree's memory and CPU are read too.
        headers: sent with requests to a URL.

    """

    def __init__(
        self,
        urls: list[str],
        now: Callable[[], float] = time.monotonic,
        names: str = USUAL,
        pid: int | None = None,
        headers: dict[str, dict[str, str]] | None = None,
    ) -> None:
        self._now = now
        self._names = names
        self._pid = pid
        self._headers = headers or {}
        self._http = {url: httpx.AsyncClient(timeout=5.0, **connection(url)) for url in urls}
        self.samples: list[Sample] = []
        self.latest: list[Sample] = []
        self.failed = 0
        # Readings that overtake each other would look like a server that began again.
        self._one_at_a_time = asyncio.Lock()

    async def once(self) -> list[Sample]:
        """Read everything once; what cannot be read is counted in ``failed``."""
        async with self._one_at_a_time:
            return await self._read()

    async def _read(self) -> list[Sample]:
        found: list[Sample] = []
        for url, http in self._http.items():
            try:
                response = await http.get(url, headers=self._headers.get(url))
                response.raise_for_status()
                when, source = self._now(), public_url(url)
                found += parse_metrics(response.text, self._names, when, source)
            except (httpx.HTTPError, ValueError):
                self.failed += 1
        found += self._process()
        self.samples += found
        self.latest = found
        return found

    def _process(self) -> Iterator[Sample]:
        if self._pid is None:
            return
        try:
            root = psutil.Process(self._pid)
            tree = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            self.failed += 1
            return
        when, source = self._now(), f"pid {self._pid}"
        for process in tree:
            with suppress(psutil.NoSuchProcess), process.oneshot():
                # each for itself: the seconds of a process that ended must not be taken off
                labels = {"pid": str(process.pid)}
                yield Sample(when, source, RSS, labels, process.memory_info().rss)
                times = process.cpu_times()
                yield Sample(when, source, CPU, labels, times.user + times.system, grows=True)

    async def watch(self, interval: float) -> None:
        """Read every ``interval`` seconds until cancelled."""
        while True:
            begin = time.monotonic()
            await self.once()
            await asyncio.sleep(max(0.05, interval - (time.monotonic() - begin)))

    async def close(self) -> None:
        """Close the connections."""
        for http in self._http.values():
            await http.aclose()


_BITS = {"0": False, "1": True}
HEADER = ("time", "source", "name", "labels", "value", "grows")


def write_samples(samples: list[Sample], path: Path) -> None:
    """Write ``metrics.csv``: time, source, name, labels as JSON, value, 1 if it counts up.

    Raises:
        LoadTestError: it cannot be written.

    """
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(HEADER)
            for s in samples:
                labels = json.dumps(s.labels, sort_keys=True)
                row = (f"{s.time:.4f}", s.source, s.name, labels, repr(s.value), int(s.grows))
                writer.writerow(row)
    except OSError as error:
        raise LoadTestError(f"cannot write {path}: {error.strerror}", CANNOT_WRITE) from None


def read_samples(path: Path) -> list[Sample]:
    """Read ``metrics.csv`` back; nothing if there is none.

    Raises:
        LoadTestError: it is not one, or was cut short.

    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        try:
            return [_sample(row) for row in csv.DictReader(file)]
        except (ValueError, TypeError, KeyError) as error:
            raise LoadTestError(f"{path}: not written whole: {error}") from None


def _sample(row: dict[str, str]) -> Sample:
    name = row["name"]
    # files of an earlier version have no such column
    grows = _BITS[row["grows"]] if "grows" in row else _grows(name, {}) or name == CPU
    labels = json.loads(row["labels"])
    return Sample(float(row["time"]), row["source"], name, labels, float(row["value"]), grows)
