"""What our layer adds to a request: p50 of one-token requests, beside plain vLLM.

Usage: ``python -m benchmarks.overhead [--rounds 5] [--requests 100]``

Two servers of the embedded model without a cache policy: vLLM's own entry point, where this
package is installed but none of its routes are loaded, and ``kvthrift serve``. They run at the same
time, and are asked in turn, one request at a time, with short prompts.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from loadtest.commands.process import ENVIRONMENT, running_server
from server.models import get_model

if TYPE_CHECKING:
    from collections.abc import Iterator

MODEL = "smollm2-135m"
FLAGS = [
    "--kv-cache-memory-bytes", str(128 << 20), "--enforce-eager", "--max-model-len", "1024",
    "--dtype", "float32", "--disable-uvicorn-access-log",
]  # fmt: skip
PORT = 9120


@contextlib.contextmanager
def plain(log: Path) -> Iterator[str]:
    """VLLM's own server."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    command += [str(get_model(MODEL)), "--served-model-name", MODEL, *FLAGS]
    command += ["--host", "127.0.0.1", "--port", str(PORT)]
    environment = {**ENVIRONMENT, **os.environ}  # the same threads
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    try:
        url = f"http://127.0.0.1:{PORT}"
        for _ in range(400):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health", trust_env=False).is_success:
                    break
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def measure(client: httpx.Client, count: int) -> float:
    """Median seconds of a one-token completion."""
    took = []
    for index in range(count):
        body = {"model": MODEL, "prompt": f"Hello {index}", "max_tokens": 1, "temperature": 0}
        begin = time.perf_counter()
        client.post("/v1/completions", json=body).raise_for_status()
        took.append(time.perf_counter() - begin)
    return statistics.median(took)


def main() -> None:
    """Serve both, ask in turn, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (
            plain(folder / "plain") as url,
            running_server([MODEL, *FLAGS], folder / "ours") as ours,
        ):
            clients = {
                "vllm": httpx.Client(base_url=url, trust_env=False),
                "kvthrift": httpx.Client(base_url=ours.url, trust_env=False),
            }
            found: dict[str, list[float]] = {who: [] for who in clients}
            for client in clients.values():
                measure(client, 10)
            for index in range(options.rounds):
                for who in sorted(clients, reverse=bool(index % 2)):
                    found[who].append(measure(clients[who], options.requests))
    for who, medians in found.items():
        print(f"{who}: p50 {1e3 * statistics.median(medians):.2f} ms, rounds "
              f"{', '.join(f'{1e3 * m:.2f}' for m in medians)}")  # fmt: skip
    ratios = [b / a for a, b in zip(found["vllm"], found["kvthrift"], strict=True)]
    print(f"kvthrift over vllm: {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
