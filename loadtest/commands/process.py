"""Starting and stopping a server of our own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx

from loadtest.connect import connection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # vLLM's default keeps a core for its scheduler: half of a two-core machine.
    "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
}


class ServerError(RuntimeError):
    """The server did not come up; the message ends with the end of its log."""


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Attributes:
        url: where.
        log: its output.
        pid: of its first process.
        start_seconds: from launch to the first answer on /health.

    """

    url: str
    log: Path
    pid: int
    start_seconds: float


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running_server(
    arguments: list[str],
    log: Path,
    *,
    timeout: float = 400.0,
    on_wait: Callable[[float], None] = lambda _: None,
) -> Iterator[Server]:
    """Run ``kvthrift serve`` with these arguments on a free loopback port, and stop it after.

    Args:
        arguments: what follows ``kvthrift serve``.
        log: file for its output.
        timeout: seconds it may take to start.
        on_wait: called with the seconds waited so far, about twice a second.

    Raises:
        ServerError: it exited or did not answer in time.

    """
    port = free_port()
    command = [sys.executable, "-m", "server", "serve", *arguments]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = {**ENVIRONMENT, **os.environ}
    if "VLLM_API_KEY" in environment:  # as the client reads it
        environment["VLLM_API_KEY"] = environment["VLLM_API_KEY"].strip()
    begin = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(process, url, log, begin, timeout, on_wait)
        yield Server(url, log, process.pid, time.monotonic() - begin)
    finally:
        _stop(process)


def _wait(
    process: subprocess.Popen[bytes],
    url: str,
    log: Path,
    begin: float,
    timeout: float,
    on_wait: Callable[[float], None],
) -> None:
    while True:
        waited = time.monotonic() - begin
        on_wait(waited)
        with contextlib.suppress(httpx.HTTPError):
            health = httpx.get(f"{url}/health", timeout=2.0, **connection(url))
            if health.status_code == httpx.codes.OK:
                return
        if process.poll() is not None or waited > timeout:
            why = "exited" if process.poll() is not None else f"did not answer in {timeout:.0f} s"
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise ServerError(f"the server {why}; end of {log}:\n{tail}")
        time.sleep(0.5)


def _stop(process: subprocess.Popen[bytes], patience: float = 20.0) -> None:
    """SIGTERM, then SIGKILL to the whole session: engine processes must not outlive it."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            if kind == signal.SIGTERM:
                process.send_signal(kind)
            else:
                os.killpg(process.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
