"""The main road: `kvthrift serve`, a real model, the openai client."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import httpx
import openai
import psutil
import pytest

from loadtest.commands.process import Server, ServerError, running_server
from tests.engine.conftest import CHUNKED, FLAGS, long_answer
from tests.engine.odd_requests import survives

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine


def test_completions_chat_and_streams(client: openai.OpenAI) -> None:
    assert next(iter(client.models.list())).id == "smollm2-135m"
    done = client.completions.create(
        model="smollm2-135m", prompt="The capital of France is", max_tokens=4, temperature=0
    )
    assert "Paris" in done.choices[0].text
    stream = client.completions.create(
        model="smollm2-135m", prompt="The capital of France is", max_tokens=4, temperature=0,
        stream=True,
    )  # fmt: skip
    assert "".join(e.choices[0].text for e in stream) == done.choices[0].text
    chat = client.chat.completions.create(
        model="smollm2-135m", messages=[{"role": "user", "content": "Say hello."}], max_tokens=8
    )
    assert chat.choices[0].message.content


def _complete(client: openai.OpenAI, policy: object) -> str:
    done = client.completions.create(
        model="smollm2-135m", prompt="The grass is green. " * 60 + "The capital of France is",
        max_tokens=4, temperature=0, extra_body={"vllm_xargs": {"cache_policy": policy}},
    )  # fmt: skip
    return done.choices[0].text


def test_a_request_chooses_its_method(client: openai.OpenAI) -> None:
    assert _complete(client, "snapkv(budget=96)")
    assert _complete(client, "streaming-llm(sinks=4,window=60)")
    chat = client.chat.completions.create(
        model="smollm2-135m", messages=[{"role": "user", "content": "Say hello."}], max_tokens=8,
        extra_body={"vllm_xargs": {"cache_policy": "expected-attention(budget=64)"}},
    )  # fmt: skip
    assert chat.choices[0].message.content


@pytest.mark.parametrize(
    ("policy", "named"),
    [
        ("snappkv", "unknown cache policy 'snappkv'; allowed: .*snapkv"),
        ("snapkv(budget=0)", "budget=0 is not above sinks"),
        ("snapkv(ratio=1.5)", "ratio=1.5 is not above 0 and at most 1"),
        ("snapkv+kivi-2bit", "cannot choose the codec 'kivi-2bit'"),
        (5, "non-empty string"),
    ],
)
def test_a_bad_method_in_a_request_is_a_400_that_names_what_is_allowed(
    client: openai.OpenAI, policy: object, named: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=named):
        _complete(client, policy)
    assert _complete(client, "all")


def test_no_request_ends_the_engine(server: Server) -> None:
    survives(server)


def test_a_server_without_a_policy_and_what_it_does_when_its_engine_is_killed(
    smollm2: Path, tmp_path: Path
) -> None:
    assert smollm2.exists()
    arguments = ["smollm2-135m", *FLAGS[:-1], str(256 << 20), *CHUNKED]
    with running_server(arguments, tmp_path / "log") as plain, ThreadPoolExecutor(1) as pool:
        client = openai.OpenAI(base_url=f"{plain.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="runs without a cache policy"):
            _complete(client, "snapkv(budget=96)")
        done = client.completions.create(model="smollm2-135m", prompt="x", max_tokens=1)
        assert not hasattr(done.usage, "kv_cache")
        stats = httpx.get(f"{plain.url}/v1/cache_policies/stats")
        assert (stats.status_code, "without a cache policy" in stats.text) == (503, True)
        assert "vLLM's own cache" in httpx.get(f"{plain.url}/policies").text
        survives(plain)
        process = psutil.Process(plain.pid)
        tree = process.children(recursive=True)
        (engine,) = [p for p in tree if "EngineCore" in " ".join(p.cmdline())]
        answer = pool.submit(long_answer, plain.url, "none")
        time.sleep(2)
        begin = time.monotonic()
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(openai.APIError):
            answer.result()
        assert time.monotonic() - begin < 10
        with contextlib.suppress(httpx.HTTPError):
            assert httpx.get(f"{plain.url}/health").status_code == 503
        assert process.wait(60) > 0


def test_a_prompt_over_the_limit_gets_vllms_own_400(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="2048"):
        client.completions.create(model="smollm2-135m", prompt="word " * 4000, max_tokens=1)


def test_metrics_show_the_pool_of_the_policy_and_the_log_names_the_kernel(server: Server) -> None:
    text = httpx.get(f"{server.url}/metrics").text
    assert "vllm:kv_cache_usage_perc" in text
    # 64 MiB hold about 64 MiB / 7200 bytes a token, less the rings
    assert 'kv_cache_size_tokens="' in text
    tokens = int(text.split('kv_cache_size_tokens="')[1].split('"')[0])
    assert 7000 < tokens < 9320
    assert "cache policy kivi-4bit, attention kernel cpu" in server.log.read_text()


def test_a_bad_policy_ends_the_command_before_a_model_is_loaded(tmp_path: Path) -> None:
    with (
        pytest.raises(ServerError, match="unknown cache policy 'kivi-5bit'; allowed: raw"),
        running_server(["smollm2-135m", "--cache-policy", "kivi-5bit"], tmp_path / "log"),
    ):
        pass
