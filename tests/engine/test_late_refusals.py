"""A server whose own policy is bounded: its pool is smaller than what other methods may ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
import pytest
import vllm

from loadtest.commands.process import running_server
from tests.engine.conftest import FLAGS

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.engine, pytest.mark.next]
PROMPT = list(range(3, 203))
PAGE = 128 * 256 * 4  # fp16: two layers of two heads


def test_what_outgrows_the_pool_is_refused_when_it_comes(tiny: str, tmp_path: Path) -> None:
    policy = "streaming-llm(window=124)+fp16"
    arguments = [tiny, "--cache-policy", policy, *FLAGS[:-1], str(9 * PAGE)]
    arguments += ["--served-model-name", "tiny", "--max-num-batched-tokens", "256"]
    with running_server(arguments, tmp_path / "log") as server:

        def ask(method: str | None, tokens: int) -> httpx.Response:
            extra = {"vllm_xargs": {"cache_policy": method}} if method else {}
            body = {"model": "tiny", "prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True}
            return httpx.post(f"{server.url}/v1/completions", json=body | extra, timeout=60)

        for method, tokens, applied in (
            (None, 1500, policy),
            ("all", 20, "fp16"),
            ("snapkv(budget=96)", 20, "snapkv(budget=96)+fp16"),
        ):
            answer = ask(method, tokens)
            assert answer.status_code == 200, answer.text
            usage = answer.json()["usage"]
            assert usage["completion_tokens"] == tokens
            assert usage["kv_cache"]["policy"] == applied
        early = ask("snappkv", 4)
        assert (early.status_code, "unknown cache policy" in early.text) == (400, True)
        late, why = ask("all", 1800), "under all need 16 pages of the cache, which has 8"
        assert why in server.log.read_text()
        if vllm.__version_tuple__ < (0, 33):  # has no way for the message
            assert late.status_code == 500
        else:
            assert late.status_code == 400
            assert why in late.json()["error"]["message"]
        assert ask("all", 20).status_code == 200
        assert 'kvthrift_requests_total{finish_reason="length"' in (
            httpx.get(f"{server.url}/metrics").text
        )
