"""Odd answers of servers, without a server."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import pytest

from loadtest.errors import LoadTestError
from loadtest.sending.client import Client, Target, new_record
from loadtest.sending.records import Record, RecordFile, read_records
from loadtest.workloads import Item
from loadtest.workloads.tokens import ServerTokenizer

USAGE = {"prompt_tokens": 3, "completion_tokens": 2}


def ask(*events: Any, is_vllm: bool = False, item_id: str = "x", done: bool = True) -> Record:
    """Send to a server that answers with these events."""
    body = "".join(f"data: {e if isinstance(e, str) else json.dumps(e)}\n\n" for e in events)
    body += "data: [DONE]\n\n" if done else ""

    async def sent() -> Any:
        yield body.encode()

    async def run() -> Record:
        client = Client(Target("http://s", "m", is_vllm=is_vllm), time.monotonic())
        http = client._borrow()
        http._transport = httpx.MockTransport(lambda _: httpx.Response(200, content=sent()))
        client._free.append(http)
        record = new_record(item := Item(item_id, "t", "c", "hi", max_tokens=2), 0.0)
        await client.send(item, record)
        await client.close()
        return record

    return asyncio.run(run())


def text(content: str) -> dict[str, Any]:
    return {"choices": [{"text": content}]}


def test_tokens_are_counted_by_event_only_where_the_server_does() -> None:
    events = (text("a") | {"usage": {**USAGE, "completion_tokens": 1}}, text("") | {"usage": USAGE})
    vllm = ask(*events, is_vllm=True)
    assert (vllm.status, vllm.event_tokens, len(vllm.events)) == ("ok", [1, 1], 2)
    other = ask(*events)
    assert (other.status, other.event_tokens, len(other.events)) == ("ok", [], 1)


@pytest.mark.parametrize(
    "odd",
    [
        {"choices": None, "usage": None},
        {"choices": None, "usage": {"prompt_tokens": 3, "completion_tokens": None}},
        {"choices": [{"delta": None, "text": None}]},
        {"choices": []},
    ],
)
def test_empty_fields_are_no_errors(odd: dict[str, Any]) -> None:
    record = ask(text("a"), odd, {"choices": [], "usage": USAGE})
    assert (record.status, record.answer, record.output_tokens) == ("ok", "a", 2)


@pytest.mark.parametrize(
    "odd",
    ["[1]", "{", '{"choices": 5}', '{"usage": {"completion_tokens": 1e999}, "choices": []}',
     "[" * 100_000],
)  # fmt: skip
def test_what_is_no_event_fails_one_request_with_its_kind(odd: str) -> None:
    record = ask(text("a"), odd)
    assert (record.status, record.error_kind) == ("error", "invalid_sse")
    assert record.answer == "a"


def test_half_a_character_and_a_foreign_id_are_written_down(tmp_path: Any) -> None:
    record = ask(
        '{"choices": [{"text": "\\ud83d"}]}', {"choices": [], "usage": USAGE}, item_id="ключ"
    )
    assert record.status == "ok"
    file = RecordFile(tmp_path / "requests.jsonl")
    file.write(record)
    file.close()
    assert read_records(tmp_path / "requests.jsonl") == [record]


def test_a_stream_without_end_is_cut() -> None:
    assert ask(text("a"), {"choices": [], "usage": USAGE}, done=False).error_kind == "stream_cut"


@pytest.mark.parametrize("answer", [{"tokens": []}, {"count": 3}, []])
def test_a_tokenizer_of_another_server_is_refused(answer: object) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json=answer))
    http = httpx.Client(base_url="http://s", transport=transport)
    with pytest.raises(LoadTestError, match="give --tokenizer"):
        ServerTokenizer(http, "m").count(["word"])
