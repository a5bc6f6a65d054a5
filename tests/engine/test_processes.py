"""Servers of several processes, with keys and logs, and how they stop."""

from __future__ import annotations

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import httpx
import openai
import psutil
import pytest

from loadtest.commands.process import running_server
from tests.engine.asking import MODEL, held, prompt
from tests.engine.conftest import FLAGS, long_answer

if TYPE_CHECKING:
    from pathlib import Path


pytestmark = pytest.mark.engine


def test_two_api_processes_count_once_and_a_key_from_a_file_is_wanted(
    smollm2: Path, tmp_path: Path
) -> None:
    assert smollm2.exists()
    key = tmp_path / "key"
    key.write_text("sesame\n")
    arguments = [MODEL, "--cache-policy", "fp16", *FLAGS, "--api-server-count", "2"]
    arguments += ["--api-key-file", str(key), "--shutdown-timeout", "30"]
    with running_server(arguments, tmp_path / "log") as two:
        assert httpx.get(f"{two.url}/v1/models").status_code == 401
        assert httpx.get(f"{two.url}/v1/cache_policies/stats").status_code == 401
        tree = [psutil.Process(two.pid), *psutil.Process(two.pid).children(recursive=True)]
        assert not [p for p in tree if "sesame" in " ".join(p.cmdline())]
        assert "sesame" not in two.log.read_text()

        def ask(index: int) -> int:
            # a connection each, so that both processes get some
            with openai.OpenAI(base_url=f"{two.url}/v1", api_key="sesame", max_retries=0) as client:
                done = client.completions.create(
                    model=f"{MODEL}@streaming-llm(window=60)", prompt=prompt(f"two {index}"),
                    max_tokens=3,
                )  # fmt: skip
                facts = held(done)
                return int(facts["computed_tokens"] - facts["kept_tokens"])

        with ThreadPoolExecutor(8) as pool:
            dropped = sum(pool.map(ask, range(16)))
        header = {"Authorization": "Bearer sesame"}
        seen = {
            httpx.get(f"{two.url}/v1/cache_policies/stats", headers=header).text for _ in range(6)
        }
        assert len(seen) == 1, "the processes disagree"
        assert f'"tokens_dropped":{dropped},' in seen.pop()
        text = httpx.get(f"{two.url}/metrics").text
        assert 'kvthrift_requests_total{finish_reason="length",policy="streaming-llm"} 16.0' in text
        with ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(long_answer, two.url, "sesame") for _ in range(4)]
            time.sleep(2)
            psutil.Process(two.pid).send_signal(signal.SIGTERM)
            time.sleep(0.5)
            late = httpx.post(
                f"{two.url}/v1/completions", json={"model": MODEL, "prompt": "x"}, headers=header
            )
            assert late.status_code == 503, late.text
            assert [a.result().usage.completion_tokens for a in answers] == [100] * 4
        assert psutil.Process(two.pid).wait(60) == 0


def test_a_server_with_a_request_log_and_compression_by_default_ends_what_runs_when_told_to_stop(
    smollm2: Path, tmp_path: Path
) -> None:
    assert smollm2.exists()
    arguments = [MODEL, "--cache-policy", "fp16", *FLAGS, "--log-requests-json"]
    arguments += ["--prompt-compression", '{"method": "selective", "rate": 0.5}']
    with running_server(arguments, tmp_path / "log") as server, ThreadPoolExecutor(1) as pool:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        text = prompt("log") + "\nWhat colour is the grass?"
        header = {"X-Request-Id": "mine"}
        more = {"ignore_eos": True}
        short = client.completions.create(
            model=MODEL, prompt=text, max_tokens=3, extra_headers=header, extra_body=more
        )
        assert short.usage.prompt_compression["method"] == "selective"  # type: ignore[union-attr]
        none = {"prompt_compression": {"method": "none"}, **more}
        whole = client.completions.create(model=MODEL, prompt=text, max_tokens=3, extra_body=none)
        assert whole.usage.prompt_tokens > 1.5 * short.usage.prompt_tokens  # type: ignore[union-attr]
        answer = pool.submit(long_answer, server.url, "none")
        time.sleep(2)
        psutil.Process(server.pid).send_signal(signal.SIGTERM)
        assert answer.result().usage.completion_tokens == 100
        assert psutil.Process(server.pid).wait(60) == 0
    lines = [json.loads(x) for x in server.log.read_text().splitlines() if x.startswith("{")]
    assert [x["output_tokens"] for x in lines] == [3, 3, 100]
    assert lines[0]["request_id"] == "mine"
    assert {x["policy"] for x in lines} == {"fp16"}
    assert "grass" not in server.log.read_text()
