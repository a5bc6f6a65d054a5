"""Two hosts: network namespaces of this machine, each with its own /dev/shm and /tmp/ray.

Needs root and ``ip netns``.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.engine.conftest import ENVIRONMENT

if TYPE_CHECKING:
    from collections.abc import Iterator

HOSTS = {"kvt-a": "10.77.0.1", "kvt-b": "10.77.0.2"}
FIRST, SECOND = HOSTS
URL = f"http://{HOSTS[FIRST]}:8000"
IP = shutil.which("ip") or ""
START, END = 300, 30  # seconds
FLAGS = [
    "--cache-policy", "kivi-4bit", "--dtype", "float32", "--max-model-len", "2048",
    "--kv-cache-memory-bytes", str(64 << 20), "--host", HOSTS[FIRST],
]  # fmt: skip
TENSOR = ["--tensor-parallel-size", "2", "--enforce-eager"]
# Eager stages do not start on a CPU; traced, and not compiled, they start sooner.
PIPELINE = ["--pipeline-parallel-size", "2", "--compilation-config", '{"mode":2,"backend":"eager"}']
METHODS = [None, "snapkv(budget=100)", "h2o(heavy=60,recent=60)"]
needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or not IP, reason="network namespaces need root and ip"
)


def ip(*command: str) -> str:
    return subprocess.run([IP, *command], check=True, capture_output=True, text=True).stdout


def kill(*hosts: str) -> None:
    """All processes of hosts, and those that these start meanwhile."""
    for host in hosts:
        until = time.monotonic() + END
        while processes := ip("netns", "pids", host).split():
            assert time.monotonic() < until, f"processes of {host} stay: {processes}"
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            time.sleep(0.1)


@contextlib.contextmanager
def two_hosts() -> Iterator[None]:
    """Two namespaces and a cable."""
    for host in HOSTS:
        ip("netns", "add", host)
    try:
        ip("link", "add", "kvt0", "netns", FIRST, "type", "veth", "peer", "kvt0", "netns", SECOND)
        for host, address in HOSTS.items():
            ip("-n", host, "address", "add", f"{address}/24", "dev", "kvt0")
            for link in ("kvt0", "lo"):
                ip("-n", host, "link", "set", link, "up")
        yield
    finally:
        for host in HOSTS:
            kill(host)
            ip("netns", "delete", host)


def installed(command: str) -> str:
    return str(Path(sys.executable).with_name(command))


def start(
    host: str, log: Path, *command: str, first: str = "true", **environment: str
) -> subprocess.Popen[bytes]:
    """Run a command on a host, after a line of shell there that must succeed."""
    own = "mkdir -p /tmp/ray && mount -t tmpfs kvt /dev/shm && mount -t tmpfs kvt /tmp/ray"
    script = f'{own} && {first} && exec "$@"'
    variables = {
        **os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_HOST_IP": HOSTS[host], "GLOO_SOCKET_IFNAME": "kvt0", **environment,
    }  # fmt: skip
    with log.open("wb") as output:
        return subprocess.Popen(
            [IP, "netns", "exec", host, "unshare", "-m", "sh", "-c", script, "-", *command],
            stdout=output, stderr=output, env=variables,
        )  # fmt: skip


def curl(path: str, body: dict[str, Any] | None = None) -> tuple[str, int]:
    """Answer and status; 0 where nobody listens."""
    given = ["--json", json.dumps(body)] if body else []
    done = subprocess.run(
        [IP, "netns", "exec", FIRST, "curl", "-s", "-m", "60", "-w", "\n%{http_code}", *given,
         URL + path], capture_output=True, text=True, check=False,
    )  # fmt: skip
    answer, _, status = done.stdout.rpartition("\n")
    return answer, int(status)


def wait_for(server: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START
    while curl("/health")[1] != 200:
        assert server.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < until, log.read_text()[-3000:]
        time.sleep(1)


def ask(model: str, method: str | None, tokens: int = 24) -> tuple[str, int]:
    prompt = [5 + (7 * i * i) % 240 for i in range(300)]
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True}  # fmt: skip
    return curl("/v1/completions", {**body, "vllm_xargs": {"cache_policy": method or "all"}})


def answers(model: str) -> list[list[int]]:
    return [json.loads(ask(model, m)[0])["choices"][0]["token_ids"] for m in METHODS]


def answers_of_one_host(model: str, log: Path) -> list[list[int]]:
    alone = start(FIRST, log, installed("kvthrift"), "serve", model, *FLAGS, "--enforce-eager")
    wait_for(alone, log)
    found = answers(model)
    kill(FIRST)
    alone.wait(END)
    return found


def lose_the_second(model: str) -> tuple[str, int, float]:
    """Kill it during an answer: that answer and its status, and seconds until then."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, model, None, 1500)
        time.sleep(1)
        assert not running.done()
        begin = time.monotonic()
        kill(SECOND)
        return *running.result(), time.monotonic() - begin
