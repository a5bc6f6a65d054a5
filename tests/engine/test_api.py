"""What kvthrift adds to vLLM's server, with the `openai` client and a browser."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import openai
import psutil
import pytest

from cache_policies.step.clock import PARTS
from loadtest.commands.process import running_server
from tests.deploy.test_grafana import missing
from tests.engine.conftest import FLAGS, long_answer

if TYPE_CHECKING:
    from pathlib import Path

    from loadtest.commands.process import Server

pytestmark = pytest.mark.engine
MODEL = "smollm2-135m"
NOISE = "The grass is green. The sky is blue. "
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
PROMTOOL = shutil.which("promtool")


def prompt(name: str, times: int = 40) -> str:
    """No prompt of another test begins so: nothing of it is in the prefix cache."""
    return f"{name}. " + NOISE * times


def held(answer: Any) -> dict[str, Any]:
    found: dict[str, Any] = answer.usage.kv_cache
    return found


def stats(server: Server, headers: dict[str, str] | None = None) -> dict[str, Any]:
    answer = httpx.get(f"{server.url}/v1/cache_policies/stats", headers=headers)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_usage_says_what_the_block_manager_counted(client: openai.OpenAI, server: Server) -> None:
    before = stats(server)
    whole = held(client.completions.create(model=MODEL, prompt=prompt("count"), max_tokens=9))
    tokens = whole["prompt_tokens"]
    assert whole["policy"] == "kivi-4bit"
    assert whole["computed_tokens"] == whole["kept_tokens"] == tokens + 8  # the last is not stored
    # 4 ring pages of 128 tokens, and a store page for every 128 tokens absorbed
    assert whole["pages"] == 4 + (tokens + 8) // 128
    assert whole["bytes"] == whole["pages"] * 128 * 7200
    assert whole["compression_ratio"] == pytest.approx((tokens + 8) * 23040 / whole["bytes"], 1e-3)
    cut = held(client.completions.create(model="fast", prompt=prompt("count"), max_tokens=9))
    assert cut["policy"] == "snapkv(budget=96)+kivi-4bit"
    assert cut["kept_tokens"] == 96 + 8
    assert cut["pages"] < whole["pages"]
    assert cut["cached_tokens"] > 0
    after = stats(server)
    assert after["tokens_dropped"] - before["tokens_dropped"] == tokens - 96
    assert after["prefix_hit_tokens"] - before["prefix_hit_tokens"] == cut["cached_tokens"]
    assert after["pages_given_back"] > before["pages_given_back"]
    assert after["used_pages"] == 0


def test_streams_chats_several_prompts_and_samples_say_it_too(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"max_tokens": 5, "temperature": 0}
    stream = client.completions.create(
        model="fast", prompt=prompt("stream"), stream=True, stream_options={"include_usage": True},
        **ask,
    )  # fmt: skip
    last = list(stream)[-1]
    assert held(last)["kept_tokens"] == 96 + 4
    said = [{"role": "user", "content": prompt("chat")}]
    chat = client.chat.completions.create(
        model=f"{MODEL}@streaming-llm(window=60)",
        messages=said,
        **ask,  # type: ignore[arg-type]
    )
    assert held(chat)["policy"] == "streaming-llm(window=60)+kivi-4bit"
    chunks = client.chat.completions.create(
        model="fast", messages=said, stream=True, stream_options={"include_usage": True},  # type: ignore[arg-type]
        **ask,
    )  # fmt: skip
    assert held(list(chunks)[-1])["policy"] == "snapkv(budget=96)+kivi-4bit"
    two = client.completions.create(model="fast", prompt=[prompt("one"), prompt("two")], **ask)
    assert held(two)["kept_tokens"] == 2 * (96 + 4)
    assert held(two)["prompt_tokens"] == two.usage.prompt_tokens  # type: ignore[union-attr]
    many = client.completions.create(
        model="fast", prompt=prompt("many"), n=3, max_tokens=5, temperature=1.0
    )
    assert len(many.choices) == 3
    assert held(many)["policy"] == "snapkv(budget=96)+kivi-4bit"


def test_what_a_stop_string_ends_says_it_too(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "fast", "max_tokens": 60, "temperature": 0}
    free = client.completions.create(prompt=prompt("stop"), **ask)
    word = free.choices[0].text.split()[3]
    done = client.completions.create(prompt=prompt("stop"), stop=word, **ask)
    assert (done.choices[0].finish_reason, word in done.choices[0].text) == ("stop", False)
    usage = done.usage
    assert usage is not None
    assert held(done)["policy"] == "snapkv(budget=96)+kivi-4bit"
    # all but the last token has passed through the model
    assert held(done)["computed_tokens"] == usage.prompt_tokens + usage.completion_tokens - 1
    assert held(done)["kept_tokens"] == 96 + usage.completion_tokens - 1
    stream = client.completions.create(
        prompt=prompt("stop"), stop=word, stream=True, stream_options={"include_usage": True}, **ask
    )
    assert held(list(stream)[-1])["kept_tokens"] == held(done)["kept_tokens"]


def test_a_prompt_is_compressed_and_the_question_stays(client: openai.OpenAI) -> None:
    text = prompt("compress") + "The code of the door is 4711. " + NOISE * 5
    ask: dict[str, Any] = {"max_tokens": 6, "temperature": 0, "logprobs": 1}
    how = {"method": "selective", "rate": 0.3}
    question = "\nThe code of the door is"
    done = client.completions.create(
        model="fast", prompt=text + question, extra_body={"prompt_compression": how}, **ask
    )
    report = done.usage.prompt_compression  # type: ignore[union-attr]
    assert report["method"] == "selective"
    assert report["compressed_tokens"] < 0.4 * report["original_tokens"]
    assert done.usage.prompt_tokens == report["compressed_tokens"]  # type: ignore[union-attr]
    assert "4711" in done.choices[0].text  # digits stay
    stream = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": text + question}], max_tokens=3,
        stream=True, stream_options={"include_usage": True},
        extra_body={"prompt_compression": how},
    )  # fmt: skip
    last = list(stream)[-1]
    assert last.usage.prompt_compression["rate"] == 0.3  # type: ignore[union-attr]
    assert held(last)["policy"] == "kivi-4bit"
    for wrong, says in (
        ({"method": "gzip"}, "method: Input should be"),
        ({"method": "llmlingua-2"}, "no compressor 'llmlingua-2'"),
    ):
        with pytest.raises(openai.BadRequestError, match=says):
            client.completions.create(
                model=MODEL, prompt="x", extra_body={"prompt_compression": wrong}
            )


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
    described = httpx.get(f"{server.url}/openapi.json").json()
    for path in ("", "/estimate", "/stats"):
        (operation,) = described["paths"][f"/v1/cache_policies{path}"].values()
        assert operation["description"]
    assert described["components"]["schemas"]["EstimateRequest"]["properties"]["policies"][
        "examples"
    ]


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


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool on this machine")
def test_promtool_finds_no_fault_in_our_metrics(server: Server) -> None:
    text = httpx.get(f"{server.url}/metrics").text
    ours = "".join(x + "\n" for x in text.splitlines() if re.match(r"(# \w+ )?kvthrift_", x))
    done = subprocess.run(
        [str(PROMTOOL), "check", "metrics"], input=ours, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


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


def test_the_dashboard_and_the_alerts_ask_for_metrics_that_exist(
    server: Server, client: openai.OpenAI
) -> None:
    client.completions.create(model="fast", prompt="one two three", max_tokens=2)
    scrape = httpx.get(f"{server.url}/metrics", timeout=20).text
    assert not missing(scrape)
    assert missing(scrape.replace("kvthrift_kv_used_bytes", "x")) == {"kvthrift_kv_used_bytes"}
