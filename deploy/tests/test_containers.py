"""The image and the compose file, really built and run: ``make deploy-test``.

Needs Docker, or podman with podman-compose. What differs from a plain machine comes by environment:

* ``DEPLOY_ENGINE``: ``docker`` or ``podman`` (default: what is there);
* ``DEPLOY_COMPOSE``: the compose command (default: ``docker compose`` or ``podman-compose``);
* ``DEPLOY_BUILD``: the build command (default: ``ENGINE build``), for mirrors and certificates.

The tests build on each other, in this order.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from loadtest.commands.process import free_port
from tests.deploy.test_grafana import ELSEWHERE, missing, queries, rules

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]
IMAGE = "kvthrift:0.1.0-cpu"
SMALL = "--enforce-eager --max-model-len 2048"
QUOTED = """--policy-alias fast='snapkv(budget=512)' --default-chat-template-kwargs '{"a b": 1}'"""
CACHE = str(128 << 20)
PROJECT = "kvthrift-deploy-test"


def engine_works(engine: str) -> bool:
    if not shutil.which(engine):
        return False
    return subprocess.run([engine, "info"], capture_output=True, check=False).returncode == 0


def find_engine() -> str | None:
    wanted = os.environ.get("DEPLOY_ENGINE")
    return next(
        (e for e in ([wanted] if wanted else ["docker", "podman"]) if engine_works(e)), None
    )


ENGINE = find_engine()
COMPOSE = shlex.split(
    os.environ.get("DEPLOY_COMPOSE", "docker compose" if ENGINE == "docker" else "podman-compose")
)

pytestmark = pytest.mark.skipif(
    ENGINE is None or not shutil.which(COMPOSE[0]),
    reason="needs Docker, or podman and podman-compose",
)


def run(*command: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(list(command), capture_output=True, text=True, check=False, **options)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def engine(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    assert ENGINE
    return run(ENGINE, *arguments, **options)


def until(what: Callable[[], Any], seconds: float, why: str) -> Any:
    """Ask once a second until the answer is true; connection errors are answers."""
    end = time.monotonic() + seconds
    while True:
        try:
            if found := what():
                return found
        except httpx.HTTPError:
            pass
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {why}"
        time.sleep(1)


def ok(url: str) -> bool:
    return httpx.get(url, timeout=5, trust_env=False).status_code == 200


@pytest.fixture(scope="module")
def image() -> str:
    build = shlex.split(os.environ.get("DEPLOY_BUILD", f"{ENGINE} build"))
    begin = time.monotonic()
    run(*build, "--target", "cpu", "--build-arg", "MODEL=smollm2-135m", "-t", IMAGE, str(ROOT))
    size = int(engine("image", "inspect", "--format", "{{.Size}}", IMAGE).stdout)
    print(f"\nbuilt in {time.monotonic() - begin:.0f} s, {size / 1e9:.2f} GB")
    return IMAGE


@pytest.fixture(scope="module")
def container(image: str) -> Iterator[tuple[str, str]]:
    """One server, as strictly as it can be run: name and address."""
    port, name = str(free_port()), "kvthrift-strict-test"
    engine("rm", "-f", name, check=False)
    engine(
        "run", "-d", "--name", name, "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL",
        "--security-opt", "no-new-privileges", "--shm-size", "1g", "-p", f"127.0.0.1:{port}:8000",
        "-v", f"{name}:/var/cache/kvthrift", image, "serve", "smollm2-135m", "--host", "0.0.0.0",
        "--cache-policy", "kivi-4bit", "--kv-cache-memory-bytes", CACHE, *SMALL.split(),
    )  # fmt: skip
    try:
        yield name, f"http://127.0.0.1:{port}"
    finally:
        engine("rm", "-f", name, check=False)
        engine("volume", "rm", "-f", name, check=False)


def test_the_image_is_what_its_file_says(image: str) -> None:
    (found,) = json.loads(engine("image", "inspect", image).stdout)
    config = found["Config"]
    assert config["User"] == "1000"
    assert config["StopSignal"] == "SIGTERM"
    health = {**config, **found}["Healthcheck"]  # podman's place, or Docker's
    assert health["StartPeriod"] >= 120e9
    assert config["Labels"]["org.opencontainers.image.title"] == "kvthrift"


def test_it_serves_read_only_and_not_as_root(container: tuple[str, str]) -> None:
    name, url = container
    until(lambda: ok(f"{url}/health"), 300, "healthy")
    assert engine("exec", name, "id", "-u").stdout.strip() == "1000"
    assert engine("exec", name, "touch", "/opt/x", check=False).returncode != 0
    check = ["healthcheck", "run", name] if ENGINE == "podman" else None
    if check:
        engine(*check)
    asked = {
        "model": "smollm2-135m@snapkv(budget=128)",
        "prompt": "The capital of France is",
        "max_tokens": 8,
        "temperature": 0,
    }
    done = run(
        "curl", "-sS", "--noproxy", "*", f"{url}/v1/completions",
        "-H", "Content-Type: application/json", "-d", json.dumps(asked),
    )  # fmt: skip
    answer = json.loads(done.stdout)
    assert "Paris" in answer["choices"][0]["text"]
    assert answer["usage"]["kv_cache"]["policy"] == "snapkv(budget=128)+kivi-4bit"


def test_it_stops_with_status_0(container: tuple[str, str]) -> None:
    name, _ = container
    begin = time.monotonic()
    engine("stop", "-t", "45", name)
    assert time.monotonic() - begin < 40
    state = engine("inspect", "--format", "{{.State.ExitCode}}", name).stdout.strip()
    assert state == "0"


WRONG = {
    "no such model": (["smollm3"], ["--shm-size", "1g"], "model 'smollm3' cannot be had"),
    "no such policy": (
        ["smollm2-135m", "--cache-policy", "kivi-3bit"], [], "unknown cache policy 'kivi-3bit'",
    ),
    "no key file": (
        ["smollm2-135m", "--api-key-file", "/run/secrets/api_key"], [],
        "--api-key-file /run/secrets/api_key: No such file or directory; write the key into it",
    ),
    "the port is taken": (
        ["smollm2-135m", "--port", "7999"], ["--network", "host", "--shm-size", "1g"],
        "port 7999 is in use; choose another with --port",
    ),
    "more cache than memory": (
        ["smollm2-135m", "--kv-cache-memory-bytes", str(1 << 50)], [], "of memory that are free",
    ),
    "less cache than one request": (
        ["smollm2-135m", "--cache-policy", "kivi-4bit", "--kv-cache-memory-bytes", "1000000"],
        ["--shm-size", "1g"],
        "decreasing `max_model_len`",
    ),
    "little shared memory": (["smollm2-135m"], [], "docker run --shm-size"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_work_says_so_and_ends(image: str, name: str) -> None:
    arguments, options, says = WRONG[name]
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 7999))
        taken.listen()
        done = engine(
            "run", "--rm", "--read-only", "--tmpfs", "/tmp", "-e", "HF_HUB_OFFLINE=1", *options,
            image, "serve", *arguments, *SMALL.split(), check=False, timeout=200,
        )  # fmt: skip
    text = done.stdout + done.stderr
    assert done.returncode not in (0, 125, 126, 127), text[-2000:]
    assert says in text, text[-4000:]


class Stack:
    """The compose project of this test."""

    def __init__(self, folder: Path) -> None:
        self.server, self.prometheus = str(free_port()), str(free_port())
        self.results = folder / "results"
        self.results.mkdir()
        self.results.chmod(0o777)
        settings = {
            "PORT": self.server,
            "PROMETHEUS_PORT": self.prometheus,
            "CACHE_MEMORY": CACHE,
            "SERVER_ARGS": f"{SMALL} {QUOTED}",
            "SHM_SIZE": "1g",
            "HF_HUB_OFFLINE": "1",
            "CPU_THREADS": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
            "RESULTS": str(self.results),
            # longer than the 15 s that Prometheus may take to find it by its name and ask it twice
            "WORKLOAD": "passkey(lengths=300|600,depths=0.2|0.5|0.8,texts=noise|essay)",
            "ARRIVALS": "closed(concurrency=2)",
        }
        self.environment = {**os.environ, **settings}

    def __call__(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        file = str(ROOT / "deploy" / "compose.yaml")
        command = [*COMPOSE, "-p", PROJECT, "-f", file, *arguments]
        return run(*command, env=self.environment, **options)

    def name(self, service: str) -> str:
        names = engine("ps", "-a", "--format", "{{.Names}}").stdout.split()
        return next(n for n in names if PROJECT in n and service in n)

    def query(self, text: str) -> list[dict[str, Any]]:
        url = f"http://127.0.0.1:{self.prometheus}/api/v1/query"
        answer = httpx.get(url, params={"query": text}, timeout=10, trust_env=False).json()
        assert answer["status"] == "success", answer
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def is_up(self) -> bool:
        return [r["value"][1] for r in self.query('up{job="kvthrift"}')] == ["1"]


@pytest.fixture(scope="module")
def stack(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    assert image
    found = Stack(tmp_path_factory.mktemp("stack"))
    found("down", "-v", check=False)
    try:
        found("up", "-d", "server", "prometheus")
        yield found
    finally:
        found("--profile", "loadtest", "down", "-v", check=False)


def test_prometheus_sees_the_server(stack: Stack) -> None:
    until(lambda: ok(f"http://127.0.0.1:{stack.server}/health"), 300, "the server healthy")
    until(stack.is_up, 60, "Prometheus scrapes it")
    until(lambda: stack.query("kvthrift_kv_capacity_bytes"), 60, "our metrics are there")


def test_quotes_hold_words_of_the_arguments_together(stack: Stack) -> None:
    url = f"http://127.0.0.1:{stack.server}/v1/models"
    models = httpx.get(url, timeout=20, trust_env=False).json()["data"]
    assert "fast" in [model["id"] for model in models]


def test_the_load_test_writes_its_report(stack: Stack) -> None:
    # Docker gives a service's name to what `run` starts only when told to; podman-compose always
    named = ["--use-aliases"] if ENGINE == "docker" else []
    command = ["--profile", "loadtest", "run", "--rm", *named, "loadtest"]
    done = stack(*command, check=False, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = stack.results / "loadtest" / "report.html"
    assert report.stat().st_size > 10_000
    summary = json.loads((stack.results / "loadtest" / "summary.json").read_text())
    assert summary["requests"]["errors"] == 0
    # Prometheus found it while it ran
    until(lambda: stack.query("last_over_time(kvthrift_loadtest_done_requests[10m])"), 30, "seen")


def test_every_panel_and_rule_finds_its_metrics(stack: Stack) -> None:
    scrape = httpx.get(f"http://127.0.0.1:{stack.server}/metrics", timeout=20, trust_env=False).text
    assert not missing(scrape)
    time.sleep(10)  # two evaluations
    empty = []
    for text in (*queries(), *rules().values()):
        bare = text.replace("$instance", ".*")
        if not stack.query(bare) and not any(name in bare for name in ELSEWHERE):
            empty.append(bare)
    # alerts do not fire, no request failed or waits, and none runs now
    quiet = (
        "num_requests_running) > 0",
        "ALERTS",
        "> 0.95",
        "preemptions",
        "requests_waiting[5m]",
        "> 0.01",
        "offset",
        "== 0",
    )
    assert not [text for text in empty if not any(q in text for q in quiet)]


def test_an_alert_fires_when_the_server_dies_and_ends_when_it_is_back(stack: Stack) -> None:
    firing = 'ALERTS{alertname="KvthriftDown",alertstate="firing"}'
    name = stack.name("server")
    engine("kill", name)
    until(lambda: stack.query(firing), 180, "the alert fires")
    engine("start", name)
    until(stack.is_up, 300, "the server is back")
    until(lambda: not stack.query(firing), 60, "the alert ends")


def test_down_leaves_nothing(stack: Stack) -> None:
    stack("--profile", "loadtest", "down", "-v")
    for kind in (["ps", "-a"], ["volume", "ls"], ["network", "ls"]):
        left = engine(*kind, "--format", "{{.Names}}" if kind[0] == "ps" else "{{.Name}}").stdout
        assert PROJECT not in left, left
