"""What Prometheus sees of a load test, and waiting for a server."""

from __future__ import annotations

import http.server
import threading
import time
from typing import TYPE_CHECKING

import httpx
import pytest

from loadtest.commands.process import free_port
from loadtest.sending.client import wait_for_server
from tests.loadtest.test_command import SMALL

if TYPE_CHECKING:
    from pathlib import Path

    from tests.loadtest.conftest import Command, MockServer


def test_prometheus_sees_the_run_while_it_lasts(
    mock: MockServer, kvthrift: Command, tmp_path: Path
) -> None:
    where = f"127.0.0.1:{free_port()}"
    seen: list[str] = []
    over = threading.Event()

    def scrape() -> None:
        while not over.wait(0.05):
            try:
                seen.append(httpx.get(f"http://{where}/metrics").text)
            except httpx.HTTPError:
                continue

    watcher = threading.Thread(target=scrape)
    watcher.start()
    url = mock(ttft=0.3, itl=0.01)
    out = ("-o", str(tmp_path), "--label", "x")
    done = kvthrift("loadtest", url, *SMALL, *out, "--serve-metrics", where)
    over.set()
    watcher.join()
    assert done.returncode == 0, done.stderr
    run = 'label="x",workload="passkey'
    running = [t for t in seen if "kvthrift_loadtest_running{arrivals=" in t and run in t]
    values = [line.rpartition(" ")[2] for t in running for line in t.splitlines()
              if line.startswith("kvthrift_loadtest_running{")]  # fmt: skip
    assert "1.0" in values
    assert "kvthrift_loadtest_planned_requests" in running[0]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://{where}/metrics")


class Starting(http.server.BaseHTTPRequestHandler):
    """Answers 503 three times, then 401: a server that is there and wants a key."""

    asked = 0

    def do_GET(self) -> None:
        type(self).asked += 1
        self.send_response(503 if self.asked <= 3 else 401)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_waiting_ends_when_the_server_says_more_than_not_yet() -> None:
    port = free_port()
    server: list[http.server.HTTPServer] = []

    def start() -> None:
        time.sleep(1.5)
        server.append(http.server.HTTPServer(("127.0.0.1", port), Starting))
        server[0].serve_forever(0.05)

    thread = threading.Thread(target=start)
    thread.start()
    wait_for_server(f"http://127.0.0.1:{port}/v1", 20)
    assert Starting.asked == 4
    server[0].shutdown()
    server[0].server_close()
    thread.join()
