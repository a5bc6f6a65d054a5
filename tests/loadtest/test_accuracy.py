"""The client's clock against a server whose delays are known."""

from __future__ import annotations

import asyncio
import gc
import time
import tracemalloc
from typing import TYPE_CHECKING

import httpx
import numpy as np
import pytest
from scipy import stats

from loadtest.sending.client import Client, Target, new_record
from loadtest.sending.records import Record, read_records
from loadtest.workloads import Item
from tests.loadtest.test_command import summary

if TYPE_CHECKING:
    from pathlib import Path

    from tests.loadtest.conftest import Command, MockServer

TTFT, ITL, TOKENS = 0.3, 0.04, 40
STREAMS = 64
RATE = STREAMS / (TTFT + (TOKENS - 1) * ITL)


def test_times_are_within_three_milliseconds_at_64_streams(
    mock: MockServer, kvthrift: Command, tmp_path: Path
) -> None:
    url = mock(ttft=TTFT, itl=ITL)
    done = kvthrift(
        "loadtest", url, "-w", f"synthetic(requests=300,input=fixed:20,output=fixed:{TOKENS})",
        "-a", f"poisson(rate={RATE})", "-o", str(tmp_path), "--tokenizer", "approximate",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    records = read_records(tmp_path / "requests.jsonl")
    busy = [sum(o.sent <= r.sent < o.finished for o in records) for r in records]
    assert np.percentile(busy, 75) > 0.8 * STREAMS
    told = httpx.get(f"{url}/truth").json()
    truth = [told[r.id] for r in records]
    gaps = [np.diff(times[1:]) for times in truth]
    known = {
        "ttft": [times[1] - times[0] for times in truth],
        "tpot": [gap.mean() for gap in gaps],
        "itl": np.concatenate(gaps),
    }
    latency = summary(tmp_path).latency
    for name, values in known.items():
        found = getattr(latency, name)
        for percentile, estimate in ((50, found.p50), (90, found.p90), (99, found.p99)):
            off = estimate.value - np.percentile(values, percentile)
            print(f"{name} p{percentile}: {off * 1e3:+.2f} ms")  # noqa: T201
            # further out it is the two busy cores that are measured
            assert percentile > 50 or abs(off) < 0.003, name
    # and what was asked for is what happened, as far as the mock server itself keeps its times
    assert latency.ttft is not None
    assert latency.ttft.p50.value == pytest.approx(TTFT, abs=0.006)
    sent = np.sort([r.sent for r in records])
    assert stats.kstest(np.diff(sent), stats.expon(scale=1 / RATE).cdf).pvalue > 0.01


def test_a_stalled_server_shows_in_the_time_from_when_requests_were_due(
    mock: MockServer, kvthrift: Command, tmp_path: Path
) -> None:
    # 20 requests a second, of which 4 at a time; nothing starts for a second and a half
    url = mock(ttft=0.05, itl=0.0, stall=1.5, stall_at=0.5)
    done = kvthrift(
        "loadtest", url, "-w", "synthetic(requests=60,input=fixed:10,output=fixed:2)",
        "-a", "constant(rate=20)", "--max-concurrency", "4", "-o", str(tmp_path), "--warmup", "0",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    latency = summary(tmp_path).latency
    assert latency.ttft is not None
    assert latency.scheduled_ttft is not None
    # seen from sending, four requests waited; seen from when they were due, thirty did
    assert latency.ttft.p90.value < 0.2
    assert latency.scheduled_ttft.p50.value > 0.3
    assert latency.scheduled_ttft.p90.value > 1.0


def test_a_prompt_of_100k_tokens_costs_little(mock: MockServer) -> None:
    url = mock(ttft=0.01, itl=0.001)
    prompt = "The grass is green. " * 20_000  # 400 KB, 5 tokens a sentence

    async def send(count: int) -> list[Record]:
        client = Client(Target(url, "mock"), time.monotonic())
        item = Item("x", "x", "x", prompt, max_tokens=8)
        records = [new_record(item, 0.0) for _ in range(count)]
        for record in records:
            await client.send(item, record)
        await client.close()
        return records

    begin = time.process_time()
    asyncio.run(send(1))
    start = time.process_time() - begin
    begin = time.process_time()
    records = asyncio.run(send(21))
    each = (time.process_time() - begin - start) / 20
    assert all(r.status == "ok" for r in records)
    assert each < 0.05, f"{each * 1e3:.1f} ms of CPU"
    print(f"{each * 1e3:.1f} ms of CPU")  # noqa: T201


def test_a_prompt_is_not_kept_after_its_answer(mock: MockServer) -> None:
    url = mock(ttft=0.001, itl=0.0)
    item = Item("x", "x", "x", "The grass is green. " * 20_000, max_tokens=2)

    async def send(count: int) -> int:
        """Bytes that stay, records apart, without a collection of garbage."""
        client = Client(Target(url, "mock"), time.monotonic())
        await client.send(item, new_record(item, 0.0))
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(count):
            await client.send(item, new_record(item, 0.0))
        kept = tracemalloc.get_traced_memory()[0] - before
        await client.close()
        return kept

    gc.disable()
    tracemalloc.start()
    try:
        assert asyncio.run(send(8)) < 200_000  # a body is 400 KB
    finally:
        tracemalloc.stop()
        gc.enable()


@pytest.mark.parametrize("chat", [False, True])
def test_what_is_sent(chat: bool) -> None:
    item = Item("x", "x", "x", "Hi", max_tokens=3, chat=chat, exact_length=True)
    route, body = Target("u", "m", is_vllm=True, extra={"cache_salt": "s"}).body(item)
    assert route == ("/v1/chat/completions" if chat else "/v1/completions")
    shared = {
        "model": "m", "max_tokens": 3, "temperature": 0, "stream": True, "cache_salt": "s",
        "ignore_eos": True, "min_tokens": 3,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }  # fmt: skip
    said = {"messages": [{"role": "user", "content": "Hi"}]} if chat else {"prompt": "Hi"}
    assert body == shared | said
    # as many tokens as the user wants, where the user says it
    shorter = {"max_tokens": 2} | ({"max_completion_tokens": 1} if chat else {})
    _, body = Target("u", "m", is_vllm=True, extra=shorter).body(item)
    assert body["min_tokens"] == (1 if chat else 2)
    _, body = Target("u", "m", is_vllm=True, extra={"min_tokens": 0}).body(item)
    assert body["min_tokens"] == 0
    # other servers get nothing they might not know
    _, plain = Target("u", "m").body(item)
    assert "ignore_eos" not in plain
    assert plain["stream_options"] == {"include_usage": True}
