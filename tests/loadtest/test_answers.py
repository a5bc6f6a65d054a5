"""What is made of a server's answer: its end, its thinking, its forms of content, its counts."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from loadtest.measuring.goodput import Goals
from loadtest.quality import score
from loadtest.sending.client import Client, Target, new_record
from loadtest.sending.records import read_records, write_records
from loadtest.workloads import Item
from tests.loadtest.answers import END, ITEM, USAGE, answered, delta, event, holding

if TYPE_CHECKING:
    from pathlib import Path


def test_a_stream_ends_at_its_mark_though_the_body_stays_open() -> None:
    body = delta(content="a") + END

    async def run(url: str) -> tuple[Any, float]:
        client = Client(Target(url, "m", timeout=5.0), time.monotonic())
        record = new_record(ITEM, 0.0)
        await client.send(ITEM, record)
        took = client.now()
        await client.close()
        return record, took

    for text in (body, body[:-1], body + delta(content="late")):
        with holding(text, hold=60) as url:
            record, took = asyncio.run(run(url))
        assert (record.status, record.error) == ("ok", None)
        assert record.answer == "a"
        assert record.finished - record.sent < 3.0
        assert took < 4.0  # far from what the connection is held, also where others run beside


def test_a_connection_is_used_again_after_an_answer() -> None:
    record = answered([delta(content="a"), END, b": late\n\n"])
    assert (record.status, record.answer) == ("ok", "a")


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
@pytest.mark.parametrize("is_vllm", [False, True])
def test_thinking_is_no_answer_and_has_the_first_token(name: str, is_vllm: bool) -> None:
    counts = iter(range(9)) if is_vllm else iter([None] * 9)
    parts = [
        delta(next(counts), role="assistant", content=""),
        delta(next(counts), **{name: "maybe London "}),
        delta(next(counts), **{name: "or Rome", "content": None}),
        delta(next(counts)),  # the end of the thinking, which the server takes away
        delta(next(counts), **{name: "", "content": "Paris"}),
        event(choices=[], usage={**USAGE, "completion_tokens": 4}) + b"data: [DONE]\n\n",
    ]
    record = answered(parts, gap=0.02, is_vllm=is_vllm)
    assert (record.status, record.answer, record.thinking) == ("ok", "Paris", "")
    assert len(record.events) == (4 if is_vllm else 3)
    assert record.thinking_at == record.events[0]
    assert record.answer_at == record.events[-1]
    assert record.first_answer == pytest.approx(record.events[-1] - record.sent)
    assert record.ttft is not None
    assert record.first_answer is not None
    assert record.ttft < record.first_answer
    assert record.thinking_tokens == (3 if is_vllm else None)
    kept = answered(parts, is_vllm=is_vllm, keep_thinking=True)
    assert (kept.answer, kept.thinking) == ("Paris", "maybe London or Rome")
    asked = Item("x", "t", "c", "?", 1, metric="f1", references=("Paris",))
    assert score(asked, kept.answer) == 1.0


def test_a_stream_that_only_thinks_has_latencies() -> None:
    parts = [delta(reasoning="a"), delta(reasoning="b", content=""), END]
    record = answered(parts, gap=0.02)
    assert (record.status, record.answer, len(record.events)) == ("ok", "", 2)
    assert record.ttft == pytest.approx(record.events[0] - record.sent)
    assert record.tpot is not None
    assert record.tpot > 0
    assert (record.answer_at, record.first_answer) == (None, None)


def test_thinking_is_counted_as_the_server_says() -> None:
    usage = {**USAGE, "completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 7}}
    end = event(choices=[], usage=usage) + b"data: [DONE]\n\n"
    assert answered([delta(reasoning="a"), delta(content="b"), end]).thinking_tokens == 7
    # thinking that is counted but hidden came in no event: two tokens did, one after the first
    hidden = answered([delta(content="b"), delta(content="c"), end], gap=0.02)
    assert (hidden.thinking_tokens, hidden.thought, hidden.thinking_at) == (7, True, None)
    assert hidden.tpot == pytest.approx(hidden.events[1] - hidden.events[0])
    # both in one event: how many of each cannot be told
    mixed = [delta(0, role="assistant"), delta(4, reasoning="a", content="b"), END]
    assert answered(mixed, is_vllm=True).thinking_tokens is None


@pytest.mark.parametrize(
    ("content", "answer", "thinking"),
    [
        ([{"type": "text", "text": "Pa"}, {"type": "text", "text": "ris"}], "Paris", ""),
        ([{"type": "output_text", "text": "Paris", "annotations": []}], "Paris", ""),
        ({"type": "text", "text": "Paris"}, "Paris", ""),
        (["Pa", {"text": "ris"}], "Paris", ""),
        ([{"type": "text", "text": {"value": "Paris", "annotations": []}}], "Paris", ""),
        ([{"type": "refusal", "refusal": "no"}], "no", ""),
        ([{"type": "image_url", "image_url": {"url": "data:"}}, {"type": "text", "text": "P"}],
         "P", ""),
        ([{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
          {"type": "text", "text": "P"}], "P", "hm"),
        ([{"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}], "", "hm"),
        ([{"type": "text", "text": None}, None, "P"], "P", ""),
        ([], "", ""),
        (None, "", ""),
        ("", "", ""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("streamed", [True, False])
def test_every_form_of_content(content: Any, answer: str, thinking: str, streamed: bool) -> None:
    if streamed:
        parts = [delta(content=content), END]
        record = answered(parts, keep_thinking=True)
    else:
        message = {"role": "assistant", "content": content}
        whole = json.dumps({"choices": [{"index": 0, "message": message}], "usage": USAGE}).encode()
        record = answered([whole], kind="application/json; charset=utf-8", keep_thinking=True)
    assert (record.status, record.error) == ("ok", None)
    assert (record.answer, record.thinking) == (answer, thinking)


@pytest.mark.parametrize("content", [5, True, 0.5])
def test_what_is_no_content_fails_one_request(content: Any) -> None:
    record = answered([delta(content=content), END])
    assert (record.status, record.error_kind) == ("error", "invalid_sse")
    assert "a content that is" in str(record.error)


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_an_answer_that_comes_whole_has_no_times_of_tokens(name: str) -> None:
    message = {"content": "Paris", name: "maybe Rome"}
    body = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": USAGE}
    record = answered([json.dumps(body).encode()], kind="application/json")
    assert (record.status, record.answer, record.finish_reason) == ("ok", "Paris", "stop")
    assert (record.output_tokens, record.events) == (2, [])
    assert (record.ttft, record.scheduled_ttft, record.tpot, record.itl) == (None, None, None, [])
    assert record.e2e == record.finished - record.sent > 0
    assert Goals.parse("ttft:9s").met(record) is None
    assert Goals.parse("e2e:9s").met(record)
    refused = answered([b'{"error": {"message": "overloaded"}}'], kind="application/json")
    assert (refused.error_kind, "overloaded" in str(refused.error)) == ("server_error", True)
    broken = answered([b"<html>"], kind="application/json")
    assert broken.error_kind == "invalid_json"


@pytest.mark.parametrize(
    "odd",
    [
        b"data:\n\n", b"data\n\n", b"data:  \n\n", b": ping\n\n", b"event: ping\ndata: {}\n\n",
        b"event: ping\ndata: 12:00\n\n", b'event: ping\ndata: {"type": "ping"}\n\n',
        b"\xef\xbb\xbf", b"retry: 3000\n\n", b'event: message\ndata: {"choices": []}\n\n',
        b'data: {"choices": [{"delta": null}]}\n\n', b'data: {"choices": null}\n\n',
    ],
)  # fmt: skip
def test_what_the_format_allows_beside_answers(odd: bytes) -> None:
    record = answered([odd + delta(content="a"), END])
    assert (record.status, record.error, record.answer) == ("ok", None, "a")


def test_one_object_over_several_data_lines() -> None:
    text = json.dumps({"choices": [{"delta": {"content": "Paris"}}]}, indent=1)
    body = "".join(f"data: {line}\r\n" for line in text.splitlines()) + "\r\n"
    assert answered([body.encode(), END]).answer == "Paris"
    one_by_one = [bytes([b]) for b in body.encode()]
    assert answered([*one_by_one, END]).answer == "Paris"


@pytest.mark.parametrize(
    "data",
    [b"event: error\ndata: overloaded\n\n", b'event: error\ndata: {"message": "overloaded"}\n\n',
     b'data: {"error": "overloaded"}\n\n',
     b'data: {"object": "error", "message": "overloaded"}\n\n'],
)  # fmt: skip
def test_errors_of_a_stream(data: bytes) -> None:
    record = answered([delta(content="a"), data, END])
    assert (record.error_kind, record.answer) == ("server_error", "a")
    assert "overloaded" in str(record.error)


def test_counts_that_a_server_does_not_give_are_none() -> None:
    def counted(**usage: Any) -> Any:
        end = event(choices=[], usage=usage) + b"data: [DONE]\n\n"
        return answered([delta(content="a"), delta(content="b"), end])

    for usage in ({"completion_tokens": 2}, {"completion_tokens": 2, "prompt_tokens": None}):
        record = counted(**usage)
        assert (record.status, record.prompt_tokens) == ("ok", None)
    assert counted(prompt_tokens=3, completion_tokens=0).error_kind == "no_usage"
    assert counted(prompt_tokens=3).error_kind == "no_usage"


def test_of_several_choices_the_first_is_the_answer() -> None:
    both = event(choices=[{"index": 1, "text": "b"}, {"index": 0, "text": "a"}])
    assert answered([both, event(choices=[{"index": 1, "text": "b"}]), END]).answer == "a"


@pytest.mark.parametrize(("cached", "found"), [(3.0, 3), ("3", None), (-1, None), (None, None)])
def test_counts_of_other_servers_can_be_read_back(
    cached: object, found: int | None, tmp_path: Path
) -> None:
    usage = {**USAGE, "prompt_tokens_details": {"cached_tokens": cached}}
    record = answered([delta(content="a"), event(choices=[], usage=usage) + b"data: [DONE]\n\n"])
    assert (record.status, record.cached_tokens) == ("ok", found)
    write_records([record], tmp_path / "r")
    assert read_records(tmp_path / "r") == [record]


def test_numbers_that_json_lacks_fail_a_request_and_no_report() -> None:
    usage = json.dumps({"choices": [], "usage": {**USAGE, "cost": float("nan")}}).encode()
    record = answered([delta(content="a"), b"data: " + usage + b"\n\ndata: [DONE]\n\n"])
    assert (record.status, record.error_kind, record.usage) == ("error", "invalid_sse", None)


def test_a_connection_that_is_not_made_is_no_answer_that_is_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def late(*_: Any, **__: Any) -> Any:
        raise httpx.ConnectTimeout("")

    async def run() -> Any:
        client = Client(Target("http://127.0.0.1:9", "m"), time.monotonic())
        monkeypatch.setattr(httpx.AsyncClient, "send", late)
        record = new_record(ITEM, 0.0)
        await client.send(ITEM, record)
        await client.close()
        return record

    record = asyncio.run(run())
    assert (record.error_kind, record.error) == ("connect", "ConnectTimeout")
