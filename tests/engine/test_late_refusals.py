"""A server whose own policy is bounded: its pool is smaller than what other methods may ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
import pytest

from loadtest.commands.process import running_server
from tests.engine.conftest import FLAGS

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine
PROMPT = list(range(3, 203))
PAGE = 128 * 256 * 4  # fp16: two layers of two heads


@pytest.mark.next
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
        assert (late.status_code, why in late.json()["error"]["message"]) == (400, True)
        assert why in server.log.read_text()
        assert ask("all", 20).status_code == 200
        assert 'kvthrift_requests_total{finish_reason="length"' in (
            httpx.get(f"{server.url}/metrics").text
        )


def test_a_late_refusal_is_a_400_with_the_reason_on_all_routes(
    smollm2: Path, tmp_path: Path
) -> None:
    assert smollm2.exists()
    arguments = [
        "smollm2-135m", "--cache-policy", "streaming-llm(window=508)+fp16", "--enforce-eager",
        "--max-model-len", "8192", "--kv-cache-memory-bytes", str(24 << 20),
    ]  # fmt: skip
    text = "word " * 3000
    asks = {
        "completions": {"prompt": text},
        "chat/completions": {"messages": [{"role": "user", "content": text}]},
        "responses": {"input": text},
    }
    with running_server(arguments, tmp_path / "log") as server:

        def post(route: str, **body: object) -> httpx.Response:
            body = {"model": "smollm2-135m", "max_tokens": 4, **body}
            return httpx.post(f"{server.url}/v1/{route}", json=body, timeout=300)

        whole = {"vllm_xargs": {"cache_policy": "all"}}
        for route, ask in asks.items():
            for stream in (False, True)[: 1 if route == "responses" else 2]:
                model = {"model": "smollm2-135m@all"} if route == "responses" else whole
                answer = post(route, stream=stream, **model, **ask)
                error = answer.json()["error"]
                assert (answer.status_code, error["code"]) == (400, 400)
                assert "pages of the cache, which has 7; ask for fewer tokens" in error["message"]
        assert post("completions", prompt=text).status_code == 200  # the engine's own method
        short = post("completions", prompt="word " * 300, stream=True, **whole)
        assert (short.status_code, "data: [DONE]" in short.text) == (200, True)
