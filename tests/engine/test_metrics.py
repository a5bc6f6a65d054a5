"""`/metrics` of a real server, and who reads it."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import httpx
import pytest

from cache_policies.step.clock import PARTS
from tests.deploy.test_grafana import missing
from tests.engine.asking import MODEL, prompt

if TYPE_CHECKING:
    import openai

    from loadtest.commands.process import Server

pytestmark = pytest.mark.engine
PROMTOOL = shutil.which("promtool")


@pytest.fixture(autouse=True)
def asked(client: openai.OpenAI) -> None:
    """Metrics with labels are there once a request was: a plain one, and one that drops tokens."""
    for model in (MODEL, "fast"):
        client.completions.create(model=model, prompt=prompt("metrics"), max_tokens=4)


def test_metrics_are_named_and_typed_as_prometheus_wants(server: Server) -> None:
    text = httpx.get(f"{server.url}/metrics").text
    ours = [line for line in text.splitlines() if re.match(r"(# \w+ )?kvthrift_", line)]
    names = {line.split()[2] for line in ours if line.startswith("# TYPE")}
    assert len(names) == 15
    spent = {p: _value(text, f'kvthrift_cache_seconds_total{{part="{p}"}}') for p in PARTS}
    assert all(seconds > 0 for seconds in spent.values())
    assert {"kvthrift_kv_used_bytes", "kvthrift_tokens_dropped_total"} <= names
    for name in names:
        kind = next(x.split()[3] for x in ours if x.startswith(f"# TYPE {name} "))
        assert (kind == "counter") == name.endswith("_total")
        assert any(line.startswith(f"# HELP {name} ") for line in ours)
    assert any(line.startswith("kvthrift_policy_info{") and line.endswith(" 1.0") for line in ours)
    assert "vllm:kv_cache_usage_perc" in text


def _value(text: str, name: str) -> float:
    (line,) = (x for x in text.splitlines() if x.startswith(name))
    return float(line.rsplit(" ", 1)[1])


def test_every_answer_is_counted_once_whoever_gave_it(server: Server) -> None:
    def counted() -> dict[str, float]:
        text = httpx.get(f"{server.url}/metrics").text
        name = r'http_requests_total\{handler="/v1/completions",method="POST",status="(...)"\}'
        return {status: float(n) for status, n in re.findall(f"{name} (.*)", text)}

    plain = {"model": MODEL, "prompt": "Hello", "max_tokens": 1}
    bodies = [
        (200, plain),
        (400, {**plain, "model": f"{MODEL}@nonsense"}),  # ours
        (413, {**plain, "prompt": "a " * 150_000}),  # ours
        (400, {**plain, "max_tokens": -1}),  # vLLM's
    ]
    before = counted()
    for status, body in bodies:
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == status
    after = counted()
    assert {s: n - before.get(s, 0) for s, n in after.items()} == {"2xx": 1, "4xx": 3}


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool on this machine")
def test_promtool_finds_no_fault_in_our_metrics(server: Server) -> None:
    text = httpx.get(f"{server.url}/metrics").text
    ours = "".join(x + "\n" for x in text.splitlines() if re.match(r"(# \w+ )?kvthrift_", x))
    done = subprocess.run(
        [str(PROMTOOL), "check", "metrics"], input=ours, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_and_the_alerts_ask_for_metrics_that_exist(server: Server) -> None:
    scrape = httpx.get(f"{server.url}/metrics", timeout=20).text
    assert not missing(scrape)
    assert missing(scrape.replace("kvthrift_kv_used_bytes", "x")) == {"kvthrift_kv_used_bytes"}
