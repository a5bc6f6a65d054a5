"""Tensor parallel over two hosts: network namespaces of this machine, each with its own /dev/shm.

Needs root and ``ip netns``. One host is killed while it answers; the other must say so and end.
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

from tests.engine.conftest import ENVIRONMENT, tiny  # noqa: F401  # a fixture

if TYPE_CHECKING:
    from collections.abc import Iterator

HOSTS = {"kvt-a": "10.77.0.1", "kvt-b": "10.77.0.2"}
FIRST, SECOND = HOSTS
URL = f"http://{HOSTS[FIRST]}:8000"
IP = shutil.which("ip") or ""
START, END = 300, 30  # seconds
FLAGS = [
    "--cache-policy", "kivi-4bit", "--dtype", "float32", "--max-model-len", "2048",
    "--kv-cache-memory-bytes", str(64 << 20), "--enforce-eager", "--host", HOSTS[FIRST],
]  # fmt: skip
OVER_TWO = ["--tensor-parallel-size", "2", "--nnodes", "2", "--master-addr", HOSTS[FIRST]]
METHODS = [None, "snapkv(budget=100)", "h2o(heavy=60,recent=60)"]
pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not IP, reason="network namespaces need root and ip"
)


def ip(*command: str) -> str:
    return subprocess.run([IP, *command], check=True, capture_output=True, text=True).stdout


def kill(host: str) -> None:
    for process in ip("netns", "pids", host).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)


@pytest.fixture
def hosts() -> Iterator[None]:
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


def start(host: str, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    own = 'mount -t tmpfs kvt /dev/shm && exec "$@"'
    kvthrift = str(Path(sys.executable).with_name("kvthrift"))
    environment = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
                   "VLLM_HOST_IP": HOSTS[host], "GLOO_SOCKET_IFNAME": "kvt0"}  # fmt: skip
    command = [IP, "netns", "exec", host, "unshare", "-m", "sh", "-c", own, "-", kvthrift]
    with log.open("wb") as output:
        return subprocess.Popen(
            [*command, "serve", *arguments], stdout=output, stderr=output, env=environment
        )


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


@pytest.mark.usefixtures("hosts")
def test_two_hosts_give_the_tokens_of_one_and_end_when_one_is_lost(
    tiny: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    alone = start(FIRST, tmp_path / "alone", tiny, *FLAGS)
    wait_for(alone, tmp_path / "alone")
    expected = answers(tiny)
    kill(FIRST)
    alone.wait(END)
    arguments = [tiny, *FLAGS, *OVER_TWO, "--node-rank"]
    start(SECOND, tmp_path / "second", *arguments, "1", "--headless")
    first = start(FIRST, tmp_path / "first", *arguments, "0")
    wait_for(first, tmp_path / "first")
    assert answers(tiny) == expected
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, tiny, None, 1500)
        time.sleep(1)
        assert not running.done()
        kill(SECOND)
        answer, status = running.result()
    assert (status, json.loads(answer)["error"]["code"]) == (500, 500)
    first.wait(END)
    assert "Connection reset by peer" in (tmp_path / "first").read_text()
