"""What only the engine can refuse, as of its size: an HTTP 400 that says why, streamed or not."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from server.api.middleware import LOG
from tests.server.fake import Server, event

OWN = {"model": "m", "vllm_xargs": {"cache_policy": "all"}}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("prompts", [["refuse"], ["fine", "refuse"]], ids=["alone", "beside"])
def test_it_is_a_400_with_the_reason(
    caplog: pytest.LogCaptureFixture, path: str, prompts: list[str], *, stream: bool
) -> None:
    prompts = prompts[::-1] if stream else prompts
    with caplog.at_level("INFO", logger=LOG.name):
        answer = Server().post({**OWN, "stream": stream, "prompts": prompts}, path=path)
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert error == {
        "message": "too large", "type": "BadRequestError", "param": None, "code": 400
    }  # fmt: skip
    assert json.loads(caplog.records[-1].getMessage())["status"] == 400


def test_a_stream_that_has_begun_ends_with_the_reason() -> None:
    answer = Server().post({**OWN, "stream": True, "prompts": ["fine", "refuse"]})
    assert answer.status_code == 200
    *_, last, done, end = answer.text.split("\n\n")
    assert json.loads(last[6:])["error"]["message"] == "too large"
    assert (done, end) == ("data: [DONE]", "")


@pytest.mark.parametrize("own", [True, False])
def test_a_stream_under_a_method_of_its_own_begins_with_its_first_event(*, own: bool) -> None:
    server = Server()
    server.engine.gates = {"slow": asyncio.Event()}
    body = {**(OWN if own else {"model": "m"}), "stream": True, "prompts": ["slow"]}
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    sent: list[Any] = []

    async def run() -> list[str]:
        messages = [{"type": "http.request", "body": json.dumps(body).encode()}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            return await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)

        work = asyncio.create_task(server.app({**scope, "asgi": {}}, receive, send))
        while not server.engine.methods:
            await asyncio.sleep(0)
        before = [m["type"] for m in sent]
        server.engine.gates["slow"].set()
        await asyncio.wait_for(work, 10)
        return before

    assert asyncio.run(run()) == ([] if own else ["http.response.start"])
    assert sent[0]["status"] == 200
    text = {"id": "cmpl-1", "choices": [{"text": 'a "usage":{ b'}]}
    assert sent[1]["body"] == event(text)
    assert b'"kv_cache"' in sent[3]["body"]
    assert sent[4]["body"] == b"data: [DONE]\n\n"


def test_who_leaves_a_stream_that_has_not_begun_is_counted_as_one_who_left() -> None:
    server = Server()
    server.engine.gates = {"slow": asyncio.Event()}
    body = json.dumps({**OWN, "stream": True, "prompts": ["slow"]}).encode()
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    sent: list[Any] = []

    async def run() -> None:
        messages = [{"type": "http.request", "body": body}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            while not server.engine.methods:
                await asyncio.sleep(0)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await asyncio.wait_for(server.app(scope, receive, send), 10)

    asyncio.run(run())
    assert sent[0]["status"] == 499
    assert server.engine.closed == 1
