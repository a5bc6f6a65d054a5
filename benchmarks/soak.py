"""A server under mixed policies at saturation, with clients that leave at random points.

Usage: ``python -m benchmarks.soak [--minutes 30] [--concurrency 8]``

A fifth of the requests are cancelled after a random share of the time theirs take. At the end: no
request may have failed that was not cancelled, every page must be free, and the memory of the
server's processes must have grown by less than 2% after the warm-up (the first fifth).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np
import psutil

from loadtest.commands.process import running_server
from loadtest.workloads.haystack import ESSAY

MODEL = "smollm2-135m"
METHODS = (
    "all", "snapkv(budget=128)", "streaming-llm(window=124)", "h2o(heavy=64,recent=64)",
    "tova(budget=128)", "pyramidkv(budget=128)", "keydiff(budget=128)",
    "expected-attention(budget=128)", "lagkv(budget=128,lag=32)",
    "infllm(topk=1,init=128,local=128)",
    "quest(topk=1,init=128,local=128)",
)  # fmt: skip
FLAGS = [
    "--cache-policy", "kivi-4bit", "--kv-cache-memory-bytes", str(64 << 20), "--enforce-eager",
    "--max-model-len", "2048", "--disable-uvicorn-access-log",
]  # fmt: skip
CANCELLED = 0.2


class Soak:
    """The clients and what became of their requests."""

    def __init__(self, url: str, seconds: float) -> None:
        self.http = httpx.AsyncClient(base_url=url, timeout=300, trust_env=False)
        self.until = time.monotonic() + seconds
        self.rng = random.Random(0)
        self.counts = {"answered": 0, "cancelled": 0}
        self.failures: list[str] = []
        self.typical = 5.0

    def body(self) -> dict[str, object]:
        """A request of a random method, length and size; some share their beginning."""
        rng = self.rng
        sentences = [rng.choice(ESSAY) for _ in range(rng.randrange(5, 50))]
        shared = list(ESSAY[:12]) if rng.random() < 0.3 else []
        return {
            "model": f"{MODEL}@{rng.choice(METHODS)}",
            "prompt": " ".join([*shared, *sentences]),
            "max_tokens": rng.randrange(1, 48),
            "n": rng.choice((1, 1, 1, 2)),
            "temperature": 1.0,
            "stream": True,
        }

    async def client(self) -> None:
        """Send until the time is over."""
        while time.monotonic() < self.until:
            body = self.body()
            if self.rng.random() < CANCELLED:
                patience = self.rng.random() * self.typical
                try:
                    await asyncio.wait_for(self.send(body), patience)
                except TimeoutError:
                    self.counts["cancelled"] += 1
            else:
                await self.send(body)

    async def send(self, body: dict[str, object]) -> None:
        """Send and read to the end."""
        begin = time.monotonic()
        try:
            async with self.http.stream("POST", "/v1/completions", json=body) as answer:
                last = before = ""
                async for line in answer.aiter_lines():
                    before, last = (last, line) if line else (before, last)
            good = answer.status_code == httpx.codes.OK and last == "data: [DONE]"
            if not good or before.startswith('data: {"error"'):
                self.failures.append(
                    f"{answer.status_code} {before[:200]} {last[:200]} for {body['model']}"
                )
        except httpx.HTTPError as error:
            self.failures.append(f"{type(error).__name__}: {error} for {body['model']}")
        self.counts["answered"] += 1
        self.typical += 0.05 * (time.monotonic() - begin - self.typical)


def memory(pid: int) -> int:
    """Resident bytes of a process tree."""
    root = psutil.Process(pid)
    return sum(p.memory_info().rss for p in (root, *root.children(recursive=True)))


async def run(url: str, pid: int, seconds: float, concurrency: int) -> bool:
    """Run, print, and say whether everything held."""
    soak, begin = Soak(url, seconds), time.monotonic()
    clients = [asyncio.create_task(soak.client()) for _ in range(concurrency)]
    seen: list[tuple[float, int]] = []
    while not all(c.done() for c in clients):
        await asyncio.sleep(10)
        seen.append((time.monotonic() - begin, memory(pid)))
        if len(seen) % 6 == 0:
            print(f"{seen[-1][0]:5.0f} s {seen[-1][1] >> 20} MiB {soak.counts} "
                  f"{len(soak.failures)} failed", flush=True)  # fmt: skip
    await asyncio.gather(*clients)
    await asyncio.sleep(3)
    pool = (await soak.http.get("/v1/cache_policies/stats")).json()
    after = [m for t, m in seen if t > seconds / 5]
    third = max(1, len(after) // 3)
    growth = float(np.median(after[-third:]) / np.median(after[:third]) - 1)
    print(f"{soak.counts}, {len(soak.failures)} failed: {soak.failures[:3]}")
    print(f"pages in use at the end: {pool['used_pages']} of {pool['capacity_pages']}; "
          f"given back early: {pool['pages_given_back']}")  # fmt: skip
    print(f"memory after the warm-up, first to last third: {growth:+.2%}")
    return not soak.failures and pool["used_pages"] == 0 and growth < 0.02


def main() -> None:
    """Serve, soak, judge."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--concurrency", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with running_server([MODEL, *FLAGS], log) as server:
            seconds = 60 * options.minutes
            good = asyncio.run(run(server.url, server.pid, seconds, options.concurrency))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
