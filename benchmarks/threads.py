"""Threads of a server: how many, how they wait, and what a neighbour on their cores costs.

Usage: ``python -m benchmarks.threads [--settings reserved=0 reserved=1 spin=1000 passive]
[--neighbour] [--rounds 3] [--tokens 64] [--streams 1 4]``

A server of the embedded model under kivi-4bit for each setting, all at the same time, are asked in
turn; API servers and this client share the same cores, as on a user's machine. Prompts are of about
600 tokens and new each time. ``reserved=N`` leaves N cores to vLLM's scheduler (1: its default),
``passive`` lets threads sleep at once where they wait for each other, ``spin=N`` after N turns of a
loop, ``usual`` is what ``kvthrift serve`` sets. With ``--neighbour`` every round is made a second
time beside a process that keeps one core busy. ``FEW_CORES`` of
server/startup.py is set by ``reserved``; docs/operations.md holds what was found.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from loadtest.commands.process import running_server
from server.startup import BIND, RESERVED

if TYPE_CHECKING:
    from collections.abc import Iterator

MODEL = "smollm2-135m"
SPINS = "GOMP_SPINCOUNT"  # of libgomp, which torch brings
FLAGS = [
    MODEL, "--cache-policy", "kivi-4bit", "--kv-cache-memory-bytes", str(128 << 20),
    "--enforce-eager", "--max-model-len", "2048", "--disable-uvicorn-access-log",
]  # fmt: skip
TEXT = "The grass is green. The sky is blue. The sun is yellow. Here we go. " * 30


def stream(url: str, name: str, tokens: int) -> tuple[float, float]:
    """Seconds to the first and to the last token of a completion."""
    body = {"model": MODEL, "prompt": f"{name}. {TEXT}", "max_tokens": tokens, "stream": True,
            "temperature": 0, "ignore_eos": True}  # fmt: skip
    begin = time.perf_counter()
    first = 0.0
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=300) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith("data: {") and not first:
                first = time.perf_counter() - begin
    return first, time.perf_counter() - begin


def measure(url: str, name: str, streams: int, tokens: int) -> tuple[float, float]:
    """Output tokens per second of all streams together, and the median time to the first."""
    with ThreadPoolExecutor(streams) as pool:
        begin = time.perf_counter()
        done = list(pool.map(lambda i: stream(url, f"{name} {i}", tokens), range(streams)))
        took = time.perf_counter() - begin
    return streams * tokens / took, statistics.median(first for first, _ in done)


def variables(setting: str) -> dict[str, str]:
    """Environment of a server with this setting."""
    name, _, value = setting.partition("=")
    if name == "reserved":
        return {RESERVED: value}
    if name == "spin":
        return {SPINS: value}
    if setting == "passive":
        return {"OMP_WAIT_POLICY": "passive"}
    raise SystemExit(f"{setting!r} is none of reserved=N, spin=N, passive, usual")


@contextmanager
def neighbour(wanted: bool) -> Iterator[None]:
    """Keep one core busy, or do not."""
    if not wanted:
        yield
        return
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        busy.kill()
        busy.wait()


@contextmanager
def serve(setting: str, log: Path) -> Iterator[str]:
    """A server with this setting, warm; its address."""
    changed = {} if setting == "usual" else variables(setting)
    before = dict(os.environ)
    os.environ.update({BIND: "auto", **changed})
    try:
        with running_server(FLAGS, log) as running:
            _restore(before)
            measure(running.url, "warm", 1, 8)
            yield running.url
    finally:
        _restore(before)


def _restore(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


def show(name: str, results: list[tuple[float, float]]) -> None:
    """Print medians over the rounds, and the rounds."""
    speed, first = (statistics.median(x) for x in zip(*results, strict=True))
    rounds = ", ".join(f"{s:.1f}" for s, _ in results)
    print(
        f"{name}: {speed:.1f} tokens/s, first token after {first:.2f} s; rounds {rounds}",
        flush=True,
    )


def main() -> None:
    """Serve all settings, ask in turn, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--settings", nargs="+", default=["reserved=0", "reserved=1"])
    parser.add_argument("--neighbour", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4])
    options = parser.parse_args()
    print(f"{len(os.sched_getaffinity(0))} cores")
    beside = [False, True] if options.neighbour else [False]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        urls = {
            name: stack.enter_context(serve(name, Path(folder) / f"log-{i}"))
            for i, name in enumerate(options.settings)
        }
        for streams, busy in itertools.product(options.streams, beside):
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in urls}
            for index in range(options.rounds):
                for name in sorted(urls, reverse=bool(index % 2)):
                    with neighbour(busy):
                        text = f"{streams} {index} {name} {busy}"
                        found[name].append(measure(urls[name], text, streams, options.tokens))
            for name, results in found.items():
                show(f"{streams} streams, {name}{', beside another' if busy else ''}", results)


if __name__ == "__main__":
    main()
