"""An OpenAI-compatible server with known delays and faults, to test the client with.

Usage: ``python -m loadtest.mock_server --port 9000 --ttft 0.2 --itl 0.02``

It answers ``max_tokens`` times a word, keeps vLLM's counters on /metrics and its own monotonic
times on /truth: by X-Request-Id when the request arrived, then of every token. A client on the same
machine can compare with them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import uvicorn
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

FAULTS = (
    "none", "401", "429", "500", "cut", "invalid_sse", "no_usage", "error_event", "no_done",
    "usage_with_choices",
)  # fmt: skip
MODEL = "mock"
TEMPLATE_WORDS = 12  # of its chat template
POOL_REQUESTS = 64  # requests that fill its KV cache


@dataclass
class Behaviour:
    """What the server does.

    Attributes:
        ttft: seconds before the first token; itl: between tokens.
        fault: what goes wrong, with every ``every``-th request.
        slots: requests served at a time; 0: any number.
        stall: seconds during which nothing starts, from ``stall_at`` seconds after the first
            request on.
        answer: text of every token; the first is the passkey, if the prompt has one.
        api_key: wanted as bearer token, if any.
        longest: most tokens of prompt and answer, as vLLM's max_model_len; 0: any number.

    """

    ttft: float = 0.1
    itl: float = 0.01
    fault: str = "none"
    every: int = 1
    slots: int = 0
    stall: float = 0.0
    stall_at: float = 0.0
    answer: str = " word"
    api_key: str = ""
    longest: int = 0


@dataclass
class State:
    """Counters and truth."""

    behaviour: Behaviour
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    requests: int = 0
    first: float | None = None
    truth: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def counter(name: str) -> Counter:
            return Counter(name, name, registry=self.registry)

        self.prompt = counter("vllm:prompt_tokens")
        self.output = counter("vllm:generation_tokens")
        self.success = counter("vllm:request_success")
        self.running = Gauge("vllm:num_requests_running", "running", registry=self.registry)
        self.use = Gauge("vllm:kv_cache_usage_perc", "use", registry=self.registry)
        slots = self.behaviour.slots
        self.gate: Any = asyncio.Semaphore(slots) if slots else contextlib.nullcontext()


def make_app(behaviour: Behaviour) -> Starlette:
    """The application."""
    state = State(behaviour)

    def refused(request: Request) -> bool:
        wanted = f"Bearer {behaviour.api_key}"
        return bool(behaviour.api_key) and request.headers.get("authorization") != wanted

    async def models(request: Request) -> Response:
        if refused(request):
            return JSONResponse({"error": "unauthorized"}, status_code=401)
        model: dict[str, Any] = {"id": MODEL, "object": "model"}
        if behaviour.longest:
            model["max_model_len"] = behaviour.longest
        return JSONResponse({"object": "list", "data": [model]})

    async def metrics(_: Request) -> Response:
        return PlainTextResponse(generate_latest(state.registry).decode())

    async def truth(_: Request) -> Response:
        return JSONResponse(state.truth)

    async def tokenize(request: Request) -> Response:
        count = _count(await request.json())
        return JSONResponse({"count": count, "tokens": list(range(count))})

    async def completions(request: Request) -> Response:
        return await _answer(state, request, chat=False)

    async def chat(request: Request) -> Response:
        return await _answer(state, request, chat=True)

    return Starlette(
        routes=[
            Route("/v1/models", models),
            Route("/metrics", metrics),
            Route("/truth", truth),
            Route("/tokenize", tokenize, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
        ]
    )


async def _answer(state: State, request: Request, *, chat: bool) -> Response:
    arrived = time.monotonic()
    body: dict[str, Any] = await request.json()
    state.first = state.first or arrived
    state.requests += 1
    behaviour = state.behaviour
    fault = behaviour.fault if state.requests % behaviour.every == 0 else "none"
    if fault.isdigit():
        message = {"error": {"message": f"mock {fault}", "type": "mock", "code": int(fault)}}
        return JSONResponse(message, status_code=int(fault))
    if 0 < behaviour.longest < _count(body) + int(body["max_tokens"]):
        message = {"error": {"message": f"mock: longer than {behaviour.longest}", "code": 400}}
        return JSONResponse(message, status_code=400)
    name = request.headers.get("x-request-id", str(state.requests))
    stream = _stream(state, body, name, arrived, fault, chat=chat)
    return StreamingResponse(stream, media_type="text/event-stream")


async def _stream(
    state: State, body: dict[str, Any], name: str, arrived: float, fault: str, *, chat: bool
) -> AsyncIterator[bytes]:
    behaviour, count = state.behaviour, int(body["max_tokens"])
    prompt = _prompt(body)
    words = prompt.split()
    times: list[float] = [arrived]
    state.truth[name] = times
    async with state.gate:
        state.running.inc()
        state.use.inc(1 / POOL_REQUESTS)
        try:
            due = max(time.monotonic(), _stalled_until(state))
            for index in range(count):
                due += behaviour.ttft if index == 0 else behaviour.itl
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                if index == count // 2:
                    if fault == "cut":
                        raise ConnectionError("mock: cut")
                    if fault == "invalid_sse":
                        yield b"data: {not json\n\n"
                    if fault == "error_event":
                        yield b'data: {"error": {"message": "mock: engine died"}}\n\n'
                text = _key(words) if index == 0 and "pass key is" in prompt else behaviour.answer
                times.append(time.monotonic())
                yield _event(text, "length" if index == count - 1 else None, chat=chat)
        finally:
            state.running.dec()
            state.use.dec(1 / POOL_REQUESTS)
    if fault != "no_usage":
        usage = {"prompt_tokens": _count(body), "completion_tokens": count}
        choices = [{"text": "", "delta": {}}] if fault == "usage_with_choices" else []
        yield b"data: " + json.dumps({"choices": choices, "usage": usage}).encode() + b"\n\n"
    state.prompt.inc(_count(body))
    state.output.inc(count)
    state.success.inc()
    if fault != "no_done":
        yield b"data: [DONE]\n\n"


def _prompt(body: dict[str, Any]) -> str:
    found: str = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
    return found


def _count(body: dict[str, Any]) -> int:
    """Words, and those of a chat template."""
    return len(_prompt(body).split()) + (TEMPLATE_WORDS if "messages" in body else 0)


def _stalled_until(state: State) -> float:
    begin = (state.first or 0.0) + state.behaviour.stall_at
    inside = begin <= time.monotonic() < begin + state.behaviour.stall
    return begin + state.behaviour.stall if inside else 0.0


def _key(words: list[str]) -> str:
    """The word after 'pass key is', as a model that found it would answer."""
    for a, b, c in zip(words, words[1:], words[2:], strict=False):
        if (a, b) == ("key", "is") and c.strip(".").isdigit():
            return " " + c
    return " none"


def _event(text: str, finish: str | None, *, chat: bool) -> bytes:
    content: dict[str, Any] = {"delta": {"content": text}} if chat else {"text": text}
    event = {"choices": [{"index": 0, "finish_reason": finish, **content}]}
    return b"data: " + json.dumps(event).encode() + b"\n\n"


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.mock_server")
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--api-key", default="")
    parser.add_argument("--fault", choices=FAULTS, default="none")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--slots", type=int, default=0)
    parser.add_argument("--longest", type=int, default=0)
    for name in ("ttft", "itl", "stall", "stall_at"):
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=float, default=getattr(Behaviour, name), dest=name)
    options = vars(parser.parse_args())
    port = options.pop("port")
    app = make_app(Behaviour(**options))
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main()
