"""An application that answers as vLLM does, with our middleware around it and no engine."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from vllm import SamplingParams
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMError

from cache_policies.vllm_plugin.versions import REFUSAL
from server.api.asked import watch
from server.api.middleware import Limits, PolicyMiddleware
from server.api.names import ModelNames
from server.api.state import ServerState

if TYPE_CHECKING:
    from starlette.requests import Request

FACTS = {
    "policy": "snapkv+kivi-4bit", "prompt_tokens": 10, "cached_tokens": 0, "computed_tokens": 20,
    "kept_tokens": 8, "pages": 2, "bytes": 100, "compression_ratio": 4.0,
}  # fmt: skip


async def error(_: Request, found: Exception) -> JSONResponse:
    """As vLLM's handler of its errors."""
    response = create_error_response(found)
    return JSONResponse(response.model_dump(), response.error.code)


class Engine:
    """Ends every prompt when it is let, and remembers under which method it came.

    Of a prompt that begins with "refuse" it says why it cannot be, as its scheduler would.
    """

    def __init__(self) -> None:
        self.methods: list[str | None] = []
        self.gates: dict[str, asyncio.Event] = {}
        self.closed = 0

    async def generate(self, prompt: str, params: SamplingParams, request_id: str) -> Any:
        self.methods.append((params.extra_args or {}).get("cache_policy"))
        try:
            if gate := self.gates.get(prompt):
                await gate.wait()
            if prompt.startswith("refuse"):
                yield SimpleNamespace(finished=True, kv_transfer_params={REFUSAL: "too large"})
                return
            yield SimpleNamespace(finished=False, kv_transfer_params=None)
            held = {**FACTS, "prompt_tokens": len(prompt)}
            yield SimpleNamespace(finished=True, kv_transfer_params={"kv_cache": held})
        finally:
            self.closed += 1


def event(content: dict[str, Any]) -> bytes:
    """One of a stream."""
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


class Server:
    """An application that answers as vLLM does, and what it was asked."""

    def __init__(self, *, max_body: int = 10_000, max_requests: int | None = None) -> None:
        names = ModelNames(served=["m"], aliases={"fast": "snapkv(budget=512)"})
        self.state = ServerState(names=names)
        self.asked: list[Any] = []
        self.raw = b"nothing came"
        self.held = asyncio.Event()
        self.held.set()
        self.engine = Engine()
        watch(self.engine)
        routes = [Route("/{path:path}", self.answer, methods=["POST"])]
        app = Starlette(routes=routes, exception_handlers={VLLMError: error})
        self.app = PolicyMiddleware(app, self.state, Limits(max_body, max_requests, log=True))

    async def answer(self, request: Request) -> Any:
        self.raw = await request.body()
        try:
            asked = dict(json.loads(self.raw))
        except (ValueError, RecursionError, TypeError):
            return JSONResponse({"error": "not a JSON object"}, 400)
        self.asked.append(asked)
        await self.held.wait()
        prompts = asked.get("prompts", ["ten tokens"])
        # vLLM takes the id of the header: two requests may have the same
        name = f"cmpl-{request.headers.get('x-request-id', 1)}"
        if asked.get("stream"):
            return StreamingResponse(self.events(name, prompts), media_type="text/event-stream")
        await asyncio.gather(*(self.one(p, name) for p in prompts))
        usage = {"prompt_tokens": 10, "completion_tokens": 3}
        params = {"kv_cache": FACTS}
        text = {"text": "ключ"}
        content = {"id": name, "choices": [text], "usage": usage, "kv_transfer_params": params}
        return JSONResponse(content)

    async def one(self, prompt: str, name: str) -> None:
        params = SamplingParams(extra_args=(self.asked[-1].get("vllm_xargs")))
        async for _ in self.engine.generate(prompt, params, name):
            pass

    async def events(self, name: str, prompts: list[str]) -> Any:
        """Server-sent events with continuous usage, as vLLM writes them."""
        try:
            begun = False
            for prompt in prompts:
                usage: dict[str, Any] = {"id": name, "choices": [], "usage": {"prompt_tokens": 10}}
                async for _ in self.engine.generate(prompt, SamplingParams(), name):
                    if not begun:
                        yield event({"id": name, "choices": [{"text": 'a "usage":{ b'}]})
                    begun = True
                    yield event(usage)
        except VLLMError as found:
            yield event(create_error_response(found).model_dump())
        yield b"data: [DONE]\n\n"

    def client(self) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app=self.app)
        return httpx.AsyncClient(transport=transport, base_url="http://server")

    def post(self, body: Any, path: str = "/v1/completions", **options: Any) -> httpx.Response:
        async def run() -> httpx.Response:
            async with self.client() as client:
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                return await client.post(path, content=content, **options)

        return asyncio.run(run())
