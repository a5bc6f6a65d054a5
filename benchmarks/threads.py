"""All cores for the model, or one left to vLLM's scheduler: tokens per second and time to first.

Usage: ``python -m benchmarks.threads [--rounds 3] [--tokens 64] [--streams 1 4]``

Two servers of the embedded model under kivi-4bit, one that computes on every core and one that
leaves one to vLLM's scheduler, its default, run at the same time and are asked in turn; API
servers and this client share the same cores, as on a user's machine. Prompts are of about 600
tokens and new each time. ``FEW_CORES`` of server/startup.py is set by this.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx

from loadtest.commands.process import running_server
from server.startup import BIND, RESERVED

MODEL = "smollm2-135m"
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


def main() -> None:
    """Serve both, ask in turn, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4])
    options = parser.parse_args()
    os.environ[BIND] = "auto"
    urls = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for reserved in (0, 1):
            os.environ[RESERVED] = str(reserved)
            log = Path(folder) / f"log-{reserved}"
            urls[reserved] = stack.enter_context(running_server(FLAGS, log)).url
            measure(urls[reserved], "warm", 1, 8)
        for streams in options.streams:
            found: dict[int, list[tuple[float, float]]] = {who: [] for who in urls}
            for index in range(options.rounds):
                for who in sorted(urls, reverse=bool(index % 2)):
                    name = f"{streams} {index} {who}"
                    found[who].append(measure(urls[who], name, streams, options.tokens))
            for who, results in found.items():
                speed, first = (statistics.median(x) for x in zip(*results, strict=True))
                print(
                    f"{streams} streams, {who} of {len(os.sched_getaffinity(0))} cores reserved: "
                    f"{speed:.1f} tokens/s, first token after {first:.2f} s; rounds "
                    + ", ".join(f"{s:.1f}" for s, _ in results),
                    flush=True,
                )


if __name__ == "__main__":
    main()
