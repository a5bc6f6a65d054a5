"""The middleware around a small application, without an engine."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMError, VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError

from server.api.answer import _together
from server.api.asked import CURRENT, Asked
from server.api.middleware import LOG
from server.compression import Compressor
from tests.cost import cpu_seconds
from tests.server.fake import FACTS, Server

if TYPE_CHECKING:
    from collections.abc import Sequence

    import httpx

    from server.compression.base import Word


def test_usage_says_what_was_held_and_nothing_else_changes() -> None:
    answer = Server().post({"model": "m"})
    content = answer.json()
    assert content["usage"] == {"prompt_tokens": 10, "completion_tokens": 3, "kv_cache": FACTS}
    assert content["kv_transfer_params"] is None
    assert content["choices"] == [{"text": "ключ"}]
    assert int(answer.headers["content-length"]) == len(answer.content)


def test_facts_of_several_prompts_are_added() -> None:
    held = Server().post({"model": "m", "prompts": ["a", "bc"]}).json()["usage"]["kv_cache"]
    assert (held["pages"], held["bytes"], held["kept_tokens"]) == (4, 200, 16)
    assert held["prompt_tokens"] == 3
    assert (held["policy"], held["compression_ratio"]) == ("snapkv+kivi-4bit", 4.0)


def test_a_ratio_that_is_not_known_lowers_no_other() -> None:
    unknown = {**FACTS, "bytes": 300, "compression_ratio": None}
    assert _together([FACTS, unknown])["compression_ratio"] == 4.0
    assert _together([unknown, unknown])["compression_ratio"] is None
    shares = [
        {**FACTS, "read_share": 0.2},
        {**FACTS, "read_share": 0.8, "prompt_tokens": 20},
        FACTS,
    ]
    assert _together(shares)["read_share"] == 0.6


def usages(text: str) -> list[dict[str, Any]]:
    chunks = [json.loads(x[6:]) for x in text.split("\n\n") if x.startswith("data: {")]
    return [c["usage"] for c in chunks if "usage" in c]


def test_the_last_chunk_of_a_stream_says_it_too() -> None:
    answer = Server().post({"model": "m", "stream": True}).text
    events = answer.split("\n\n")
    assert json.loads(events[0][6:])["choices"] == [{"text": 'a "usage":{ b'}]
    first, last = usages(answer)
    assert first == {"prompt_tokens": 10}
    assert last == {"prompt_tokens": 10, "kv_cache": FACTS}
    assert events[3] == "data: [DONE]"


def test_what_was_held_belongs_to_a_request_and_not_to_the_id_a_client_chose() -> None:
    """A stream, and beside it a request of the same id that ends before it and is read after."""
    server = Server()

    async def run() -> tuple[str, httpx.Response]:
        server.engine.gates = {"short": asyncio.Event()}
        same: dict[str, Any] = {"headers": {"X-Request-Id": "mine"}}
        async with server.client() as client:
            streamed = asyncio.create_task(
                client.post("/v1/completions", json={"stream": True, "prompts": ["short"]}, **same)
            )
            while not server.engine.methods:
                await asyncio.sleep(0)
            whole = await client.post("/v1/completions", json={"prompts": ["x" * 1000]}, **same)
            server.engine.gates["short"].set()
            return (await streamed).text, whole

    text, whole = asyncio.run(run())
    assert whole.json()["usage"]["kv_cache"]["prompt_tokens"] == 1000
    assert [u.get("kv_cache", {}).get("prompt_tokens") for u in usages(text)] == [None, 5]


def test_of_beams_nothing_is_said_and_a_policy_for_them_is_refused() -> None:
    server = Server()
    answer = server.post({"model": "m", "use_beam_search": True}).json()
    assert "kv_cache" not in answer["usage"]
    for body in ({"model": "fast"}, {"model": "m", "vllm_xargs": {"cache_policy": "h2o"}}):
        for yes in (True, 1.0, "on"):  # all of it pydantic's yes
            refused(server.post({**body, "use_beam_search": yes}), 400, "beam search")


def test_a_generation_ends_when_its_reader_goes() -> None:
    server = Server()

    async def run() -> None:
        token = CURRENT.set(Asked())
        outputs = server.engine.generate("x", SamplingParams(), "1")
        await anext(outputs)
        await outputs.aclose()
        CURRENT.reset(token)

    asyncio.run(run())
    assert server.engine.closed == 1


@pytest.mark.parametrize(
    ("name", "model", "method"),
    [
        ("m", "m", None),
        ("fast", "m", "snapkv(budget=512)"),
        ("m@h2o(heavy=9,recent=9)", "m", "h2o(heavy=9,recent=9)"),
        ("other@h2o", "other@h2o", None),
        ("x", "x", None),
    ],
)
def test_a_model_name_carries_a_method(name: str, model: str, method: str | None) -> None:
    server = Server()
    server.post({"model": name, "vllm_xargs": {"other": 1}})
    (asked,) = server.asked
    assert asked["model"] == model
    assert asked["vllm_xargs"].get("cache_policy") == method
    assert asked["vllm_xargs"]["other"] == 1


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"1", b"\xff", b"[" * 9000, b'{"model": [1]}'])
def test_what_is_not_a_request_is_left_to_vllm(body: bytes) -> None:
    server = Server()
    server.post(body)
    assert server.raw == body


def refused(answer: httpx.Response, status: int, says: str) -> None:
    assert answer.status_code == status
    error = answer.json()["error"]
    assert says in error["message"]
    assert error["code"] == status


def test_what_is_refused() -> None:
    server = Server(max_body=1000)
    twice = {"model": "fast", "vllm_xargs": {"cache_policy": "h2o"}}
    refused(server.post(twice), 400, "given twice")
    for stream in (True, False):  # a stream must not begin with 200 and then say it
        wrong = {"model": "m", "stream": stream, "vllm_xargs": {"cache_policy": "h2o(heavy=-1)"}}
        refused(server.post(wrong), 400, "heavy")
    refused(server.post({"model": "m@lagkv(budget=1)"}), 400, "budget=1 is not above")
    refused(server.post({"model": "m", "vllm_xargs": {"cache_policy": 7}}), 400, "7")
    refused(server.post({"model": "m", "structured_outputs": True}), 400, "must be an object")
    refused(server.post({"model": "m", "prompt_compression": {}}), 400, "method: Field required")
    wanted = {"method": "llmlingua-2"}
    answer = server.post({"model": "m", "prompt": "x", "prompt_compression": wanted})
    refused(answer, 400, "no compressor 'llmlingua-2'")
    refused(server.post({"model": "m" * 1000}), 413, "over 1000 bytes")
    assert not server.asked
    refused(server.post(b"x" * 2000, path="/v1/other"), 413, "over 1000 bytes")
    assert server.post(b"x" * 200, path="/v1/other").status_code == 400  # vLLM's own


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"model": "m", "vllm_xargs": {"cache_policy": " " * 200_000}}, "has 200000 letters"),
        ({"model": f"m@{' ' * 200_000}"}, "the model name has 200002 letters"),
        ({"model": "@" * 200_000}, "the model name has 200000 letters"),
        ({"model": "m", **dict.fromkeys(map("cache_pol{}".format, range(9000)))}, "1000 are taken"),
        (
            {"vllm_xargs": dict.fromkeys(map("cache_pol{}".format, range(9000)), 1)},
            "1000 are taken",
        ),
    ],
    ids=["policy", "name", "ats", "keys", "xargs"],
)
def test_what_would_keep_other_requests_waiting_is_refused_at_once(
    body: dict[str, Any], says: str
) -> None:
    server = Server(max_body=1_000_000)
    answer = server.post(body)
    refused(answer, 400, says)
    assert cpu_seconds(lambda: server.post(body)) < 0.5
    assert len(answer.content) < 1500
    assert not server.asked


def test_a_long_key_is_vllms() -> None:
    """Compared by its length alone: it is like none of ours."""
    server = Server(max_body=6_000_000)
    body = {"model": "m", "x" * 5_000_000: 1}
    assert server.post(body).status_code == 200
    assert cpu_seconds(lambda: server.post(body)) < 0.5


def test_too_much_without_a_length_is_refused_before_it_is_read_whole() -> None:
    server = Server(max_body=1000)
    sent = []

    async def endless() -> Any:
        for _ in range(1000):
            sent.append(1)
            yield b"x" * 100

    async def run() -> httpx.Response:
        async with server.client() as client:
            return await client.post("/v1/completions", content=endless())

    refused(asyncio.run(run()), 413, "over 1000 bytes")


def test_requests_over_the_limit_get_429_and_a_time_to_wait() -> None:
    server = Server(max_requests=2)

    async def run() -> list[httpx.Response]:
        server.held.clear()
        async with server.client() as client:
            tasks = [
                asyncio.create_task(client.post("/v1/completions", json={"model": "m"}))
                for _ in range(2)
            ]
            while len(server.asked) < 2:
                await asyncio.sleep(0)
            third = await client.post("/v1/completions", json={"model": "m"})
            server.held.set()
            first = await asyncio.gather(*tasks)
            return [*first, third, await client.post("/v1/completions", json={"model": "m"})]

    first, second, third, fourth = asyncio.run(run())
    refused(third, 429, "2 requests are under way")
    assert third.headers["retry-after"] == "1"
    assert first.status_code == second.status_code == fourth.status_code == 200


def test_other_routes_are_passed_on_as_they_are_and_not_counted_unless_they_generate() -> None:
    server = Server(max_requests=0)
    answer = server.post({"model": "m"}, path="/v1/other")
    assert answer.json()["kv_transfer_params"] == {"kv_cache": FACTS}
    refused(server.post({"model": "m"}, path="/v1/responses"), 429, "under way")


def test_a_server_that_is_stopping_takes_no_more() -> None:
    server = Server()
    server.state.stopping = True
    answer = server.post({"model": "m"})
    refused(answer, 503, "is stopping")
    assert answer.headers["retry-after"] == "10"
    assert not server.asked


class Endless(Compressor):
    """Never done, and remembers whether it was stopped."""

    name: ClassVar[str] = "selective"
    most_letters = most_words = 100

    def __init__(self) -> None:
        self.begun, self.stopped = asyncio.Event(), False

    async def scores(self, text: str, words: Sequence[Word]) -> list[float]:
        self.begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.stopped = True
            raise
        return [0.0] * len(words)


def test_compression_ends_when_the_client_leaves() -> None:
    server, endless = Server(), Endless()
    server.state.compressors = {"selective": endless}
    body = json.dumps({"prompt": "a b c\nd", "prompt_compression": {"method": "selective"}})
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}

    async def run() -> None:
        messages = [{"type": "http.request", "body": body.encode()}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await endless.begun.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await asyncio.wait_for(server.app(scope, receive, send), 10)

    sent: list[Any] = []
    asyncio.run(run())
    assert endless.stopped
    assert sent[0]["status"] == 499  # for whoever counts answers
    assert not sent[1]["body"]
    assert not server.asked


class Failing(Endless):
    """The engine refuses, or has died."""

    def __init__(self, error: VLLMError) -> None:
        self.error = error

    async def scores(self, text: str, words: Sequence[Word]) -> list[float]:
        raise self.error


@pytest.mark.parametrize(
    ("error", "code"), [(VLLMValidationError("too long"), 400), (EngineDeadError(), 500)]
)
def test_what_the_engine_says_to_a_compression_is_answered(error: VLLMError, code: int) -> None:
    server = Server()
    server.state.compressors = {"selective": Failing(error)}
    body = {"prompt": "a b c\nd", "prompt_compression": {"method": "selective"}}
    refused(server.post(body), code, str(error))


def test_a_log_line_says_who_and_what_but_no_text(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger=LOG.name):
        Server().post({"model": "m", "prompt": "secret"}, headers={"X-Request-Id": "abc"})
        Server(max_body=5).post({"model": "m", "prompt": "secret"})
    first, second = (json.loads(r.getMessage()) for r in caplog.records if r.name == LOG.name)
    assert first.pop("time") > 0
    assert first.pop("seconds") >= 0
    assert first == {
        "request_id": "abc", "path": "/v1/completions", "status": 200,
        "policy": "snapkv+kivi-4bit", "prompt_tokens": 10, "output_tokens": 3, "kv_bytes": 100,
    }  # fmt: skip
    assert second["status"] == 413
    assert "secret" not in caplog.text
