"""The routes that kvthrift adds to vLLM's server, with the `openai` client and a browser."""

from __future__ import annotations

import shutil
import subprocess
import time
from typing import TYPE_CHECKING

import httpx
import openai
import pytest

from tests.engine.asking import MODEL, prompt, stats

if TYPE_CHECKING:
    from pathlib import Path

    from loadtest.commands.process import Server

pytestmark = pytest.mark.engine
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def test_aliases_are_listed_and_bad_names_are_refused(client: openai.OpenAI) -> None:
    cards = {m.id: m for m in client.models.list()}
    assert set(cards) == {MODEL, "fast"}
    assert cards["fast"].cache_policy == "snapkv(budget=96)"  # type: ignore[attr-defined]
    with pytest.raises(openai.BadRequestError, match=r"unknown cache policy 'foo'; allowed"):
        client.completions.create(model=f"{MODEL}@foo", prompt="x", max_tokens=1)
    with pytest.raises(openai.BadRequestError, match="cannot choose the codec"):
        client.completions.create(model=f"{MODEL}@kivi-2bit", prompt="x", max_tokens=1)
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="nobody@snapkv", prompt="x", max_tokens=1)
    with pytest.raises(openai.BadRequestError, match="given twice"):
        client.completions.create(
            model="fast", prompt="x", extra_body={"vllm_xargs": {"cache_policy": "h2o"}}
        )
    with pytest.raises(openai.APIStatusError, match="over 200000 bytes") as error:
        client.completions.create(model=MODEL, prompt="x" * 300_000, max_tokens=1)
    assert error.value.status_code == 413


def test_the_policies_are_listed_with_what_is_lost(server: Server) -> None:
    listed = httpx.get(f"{server.url}/v1/cache_policies").json()
    assert (listed["model"], listed["server_policy"]) == (MODEL, "kivi-4bit")
    terms = {t["name"]: t for t in listed["policies"]}
    assert terms["kivi-4bit"]["allowed"]
    assert "the codec is the server's" in terms["fp16"]["why_not"]
    assert terms["snapkv"]["allowed"]
    assert terms["snapkv"]["loses"]
    names = {p["name"]: p for p in terms["snapkv"]["parameters"]}
    assert names["budget"] == {"name": "budget", "type": "integer", "default": 1024}


def test_estimates_agree_with_the_pool_and_bad_ones_are_refused(server: Server) -> None:
    url = f"{server.url}/v1/cache_policies/estimate"
    asked = {"memory_bytes": 64 << 20, "context_tokens": 1000, "policies": ["kivi-4bit", "foo"]}
    good, bad = httpx.post(url, json=asked).json()["estimates"]
    assert good["bytes_per_token"] == stats(server)["token_bytes"]
    assert good["concurrent_requests"] == stats(server)["capacity_pages"] // (4 + 7)
    assert bad["error"].startswith("unknown cache policy 'foo'")
    shape = {"layers": 32, "num_kv_heads": 8, "head_size": 128}
    answer = httpx.post(url, json={"model_shape": shape, "policies": ["fp16"]}).json()
    assert answer["estimates"][0]["bytes_per_token"] == 32 * 8 * 128 * 2 * 2
    for wrong in ({"policies": []}, {"memory_bytes": -1}, {"x": 1}, {"model_shape": {"layers": 1}}):
        assert httpx.post(url, json=wrong).status_code == 400, wrong
    assert httpx.post(url, content=b"{").status_code == 400


def test_the_routes_are_described(server: Server) -> None:
    described = httpx.get(f"{server.url}/openapi.json", timeout=60).json()
    for path in ("", "/estimate", "/stats"):
        (operation,) = described["paths"][f"/v1/cache_policies{path}"].values()
        assert operation["description"]
    assert described["components"]["schemas"]["EstimateRequest"]["properties"]["policies"][
        "examples"
    ]


def test_a_client_that_leaves_gives_its_pages_back(client: openai.OpenAI, server: Server) -> None:
    stream = client.completions.create(
        model=MODEL, prompt=prompt("leave"), max_tokens=1000, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    next(iter(stream))
    assert stats(server)["used_pages"] > 0
    stream.close()
    until = time.monotonic() + 5
    while stats(server)["used_pages"] and time.monotonic() < until:
        time.sleep(0.1)
    assert stats(server)["used_pages"] == 0


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_the_page_opens_without_errors(server: Server, tmp_path: Path) -> None:
    done = subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         f"--user-data-dir={tmp_path}", "--enable-logging=stderr", "--dump-dom",
         f"{server.url}/policies"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "<code>kivi-4bit</code>" in done.stdout
    assert f"of {stats(server)['capacity_pages']} pages" in done.stdout
    assert "smollm2-135m@snapkv(budget=512)" in done.stdout
