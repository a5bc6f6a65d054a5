"""Proxy variables: loopback is asked directly, and a proxy that cannot be had is one line."""

from __future__ import annotations

import http.server
import importlib.util
import json
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from loadtest.commands.process import free_port
from loadtest.connect import connection, is_loopback, proxy_of
from loadtest.errors import LoadTestError
from loadtest.measuring.scrape import Scraper
from tests.loadtest.test_command import QUICK, SMALL, summary

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.loadtest.conftest import Command, MockServer

ROOT = Path(__file__).parents[2]
NAMES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
SOCKS = "socks5://127.0.0.1:9"
DEAD = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("localhost", True), ("LOCALHOST", True), ("localhost.", True), ("a.localhost", True),
        ("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("::ffff:127.0.0.1", True),
        ("0.0.0.0", True), ("::", True),  # noqa: S104
        ("10.0.0.1", False), ("mylocalhost", False),
        ("localhost.example.org", False), ("128.0.0.1", False), ("::2", False), ("", False),
    ],
)  # fmt: skip
def test_loopback(host: str, here: bool) -> None:
    assert is_loopback(host) is here


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://[::1]:1/v1", "https://localhost"])
@pytest.mark.parametrize("proxy", [SOCKS, DEAD, "https://p:1", "nonsense://x", "http://:x"])
def test_loopback_is_asked_directly_whatever_the_proxy(
    bare: pytest.MonkeyPatch, url: str, proxy: str
) -> None:
    for name in NAMES[:3]:
        bare.setenv(name, proxy)
    assert proxy_of(url) is None


@pytest.mark.parametrize(
    ("environment", "url", "proxy"),
    [
        ({}, "http://h", None),
        ({"HTTP_PROXY": "http://p:1"}, "http://h", "http://p:1"),
        ({"HTTP_PROXY": "p:1"}, "http://h", "http://p:1"),
        ({"HTTP_PROXY": "http://p:1"}, "https://h", None),
        ({"HTTPS_PROXY": "http://p:1"}, "https://h", "http://p:1"),
        ({"https_proxy": "https://p:1"}, "https://h", "https://p:1"),
        ({"ALL_PROXY": "http://p:1"}, "https://h", "http://p:1"),
        ({"ALL_PROXY": "http://a:1", "HTTP_PROXY": "http://p:1"}, "http://h", "http://p:1"),
        ({"HTTP_PROXY": ""}, "http://h", None),
    ],
)
def test_the_proxy_of_a_url(
    bare: pytest.MonkeyPatch, environment: dict[str, str], url: str, proxy: str | None
) -> None:
    for name, value in environment.items():
        bare.setenv(name, value)
    found = proxy_of(url)
    assert (found and str(found.url)) == proxy
    httpx.Client(**connection(url)).close()


@pytest.mark.parametrize(
    ("excepted", "url", "direct"),
    [
        ("*", "http://h", True),
        ("h", "http://h:8000", True),
        ("other, h", "http://h", True),
        ("other h", "http://h", True),
        ("example.org", "http://a.example.org", True),
        (".example.org", "http://a.example.org", True),
        ("*.example.org", "http://a.example.org", True),
        ("EXAMPLE.org", "http://example.ORG", True),
        ("example.org", "http://notexample.org", False),
        ("h:8000", "http://h:8000", True),
        ("h:8000", "http://h:8001", False),
        ("h:443", "https://h", True),
        ("10.0.0.0/8", "http://10.1.2.3:80", True),
        ("10.0.0.0/8", "http://11.1.2.3", False),
        ("10.1.2.3", "http://10.1.2.3", True),
        ("fd00::/8", "http://[fd00::1]:80", True),
        ("[fd00::1]", "http://[fd00::1]", True),
        ("fd00::1", "http://[fd00::2]", False),
        ("", "http://h", False),
    ],
)
def test_no_proxy(bare: pytest.MonkeyPatch, excepted: str, url: str, direct: bool) -> None:
    bare.setenv("HTTP_PROXY", SOCKS)  # would be refused if it were used
    bare.setenv("HTTPS_PROXY", SOCKS)
    bare.setenv("NO_PROXY", excepted)
    if direct:
        assert proxy_of(url) is None
    else:
        bare.setenv("HTTP_PROXY", "http://p:1")
        assert proxy_of(url) is not None


@pytest.mark.parametrize(
    ("proxy", "says"),
    [
        ("socks5://user:sesame@127.0.0.1:9", "needs socksio"),
        ("socks4://127.0.0.1:9", "is not a URL of http, https, socks5 or socks5h"),
        ("http://p:port", "is not a URL of"),
        ("http://", "is not a URL of"),
    ],
)
def test_a_proxy_that_cannot_be_had_is_one_line(
    bare: pytest.MonkeyPatch, kvthrift: Command, proxy: str, says: str
) -> None:
    spec = importlib.util.find_spec
    bare.setattr("loadtest.connect.find_spec", lambda n: None if n == "socksio" else spec(n))
    bare.setenv("ALL_PROXY", proxy)
    with pytest.raises(LoadTestError, match="set NO_PROXY=far"):
        proxy_of("http://far:8000")
    for wait in ((), ("--wait", "1")):
        done = kvthrift("loadtest", "http://far:8000", *wait)
        assert done.returncode == 4, done.stdout + done.stderr
        assert says in done.stderr
        assert done.stderr.startswith("kvthrift: ALL_PROXY: the proxy")
        assert done.stderr.count("\n") == 1
        assert "sesame" not in done.stdout + done.stderr


def test_a_proxy_that_does_not_answer_is_named(bare: pytest.MonkeyPatch, kvthrift: Command) -> None:
    bare.setenv("HTTP_PROXY", DEAD)
    done = kvthrift("loadtest", "http://far:8000")
    assert done.returncode == 4
    assert f"no server answers at http://far:8000 through {DEAD}" in done.stderr


def test_a_run_on_loopback_beside_proxies(
    bare: pytest.MonkeyPatch, mock: MockServer, kvthrift: Command, tmp_path: Path
) -> None:
    url = mock(**QUICK)
    bare.setenv("ALL_PROXY", SOCKS)
    bare.setenv("HTTP_PROXY", DEAD)
    by_name = url.replace("127.0.0.1", "localhost")
    done = kvthrift("loadtest", by_name, *SMALL, "-o", str(tmp_path), "--wait", "5")
    assert done.returncode == 0, done.stdout + done.stderr
    found = summary(tmp_path)
    assert found.requests.ok == 2
    assert found.server is not None  # its metrics were read directly too
    assert found.server.failed_scrapes == 0


def test_metrics_from_elsewhere_go_through_the_proxy(bare: pytest.MonkeyPatch) -> None:
    bare.setenv("HTTP_PROXY", SOCKS)
    bare.setattr("loadtest.connect.find_spec", lambda _: None)
    with pytest.raises(LoadTestError, match="needs socksio"):
        Scraper(["http://far/metrics"])


class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def healthy() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", free_port()), Healthy)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("proxy", [SOCKS, DEAD])
def test_the_images_health_check_asks_directly(
    bare: pytest.MonkeyPatch, healthy: str, proxy: str
) -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("HEALTHCHECK"))
    command = json.loads(lines[at + 1].strip().removeprefix("CMD "))
    assert command[0] == "python3.11"
    code = command[-1].replace("http://127.0.0.1:8000", healthy)
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        bare.setenv(name, proxy)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, shlex.join(command) + done.stderr
    sick = code.replace("/health", "/nothing")
    command = [sys.executable, "-c", sick]
    assert subprocess.run(command, capture_output=True, timeout=30, check=False).returncode
