"""Around vLLM's routes: limits; on completions, model names that carry a method, and what was held.

vLLM's own handlers stay as they are. A request's body is read once, up to a limit; a model name
like ``NAME@snapkv(budget=512)`` becomes the model and ``vllm_xargs``; in the answer, and in a
stream's last chunks, ``usage`` gets ``kv_cache``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse

from cache_policies.errors import PolicyError
from cache_policies.vllm_plugin.config import POLICY_KEY
from cache_policies.vllm_plugin.frontend import check_method
from server.api.answer import Answer
from server.compression import CompressorError
from server.compression.request import FIELD as COMPRESSION
from server.compression.request import compress_request

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from server.api.state import ServerState
    from server.compression.request import Report

COMPLETIONS = ("/v1/completions", "/v1/chat/completions")
# the other routes of vLLM that occupy the engine; COMPLETIONS are counted with them
GENERATING = (
    *COMPLETIONS, "/v1/chat/completions/batch", "/v1/responses", "/v1/messages", "/v1/systemone",
    "/invocations", "/inference/v1/generate", "/generative_scoring", "/cohere/v2/chat",
)  # fmt: skip
LOG = logging.getLogger("kvthrift.requests")


class RefusalError(Exception):
    """A request that is refused here, in OpenAI's error form."""

    def __init__(self, status: int, message: str, param: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, headers

    def response(self) -> JSONResponse:
        """The answer."""
        kinds = {413: "request_too_large", 429: "rate_limit_exceeded", 503: "service_unavailable"}
        kind = kinds.get(self.status, "BadRequestError")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.status}
        return JSONResponse({"error": error}, self.status, self.headers)


@dataclass(frozen=True)
class Limits:
    """What is refused, and what is logged.

    Attributes:
        max_body: most bytes of a request's body, on every route.
        max_requests: most requests under way in this process that occupy the engine; None: no
            limit.
        log: write a line of JSON per request.

    """

    max_body: int
    max_requests: int | None = None
    log: bool = False


class PolicyMiddleware:
    """ASGI middleware.

    Args:
        app: what it stands around.
        state: of this process.
        limits: of requests.

    """

    def __init__(self, app: ASGIApp, state: ServerState, limits: Limits) -> None:
        self._app, self._state, self._limits = app, state, limits
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        begin = time.monotonic()
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        answer = Answer(self._state, send, complete=path in COMPLETIONS)
        try:
            with self._counted(path):
                await self._answer(scope, receive, answer)
        except RefusalError as refusal:
            await refusal.response()(scope, receive, answer.send)
        finally:
            answer.finish()
            if self._limits.log:
                _log(scope, answer, time.monotonic() - begin)

    @contextlib.contextmanager
    def _counted(self, path: str) -> Iterator[None]:
        """One of the requests under way, if it is one that occupies the engine.

        Raises:
            RefusalError: there are too many, or the server is told to stop.

        """
        if path not in GENERATING:
            yield
            return
        if self._state.stopping:
            raise RefusalError(503, "the server is stopping", **{"Retry-After": "10"})
        limit = self._limits.max_requests
        if limit is not None and self._running >= limit:
            message = f"{self._running} requests are under way already; try again later"
            raise RefusalError(429, message, **{"Retry-After": "1"})
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    async def _answer(self, scope: Scope, receive: Receive, answer: Answer) -> None:
        body = await _read_body(scope, receive, self._limits.max_body)
        if body is None:
            return
        if not answer.complete:
            await self._app(scope, _replay(body, receive), answer.send)
            return
        leaving = asyncio.create_task(_message(receive))  # no other message can come now
        work = asyncio.create_task(self._translate(body))
        try:
            await asyncio.wait((leaving, work), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                body, answer.compression = work.result()
                await self._app(
                    _with_length(scope, body), _replay(body, _ended(leaving)), answer.send
                )
        finally:
            leaving.cancel()
            work.cancel()
            await asyncio.gather(leaving, work, return_exceptions=True)

    async def _translate(self, body: bytes) -> tuple[bytes, Report | None]:
        """The body vLLM gets; what is not JSON is left to vLLM's own refusal.

        Raises:
            RefusalError: it asks for what cannot be.

        """
        try:
            asked = json.loads(body)
        except (ValueError, RecursionError):
            return body, None
        if not isinstance(asked, dict):
            return body, None
        if not isinstance(asked.get("structured_outputs"), dict | None):
            # vLLM 0.32 looks into it before it checks what it is, and answers 500
            raise RefusalError(400, "structured_outputs must be an object", "structured_outputs")
        named = self._name_method(asked)
        _check_method(asked, "model" if named else "vllm_xargs")
        report = await self._compress(asked)
        return (json.dumps(asked).encode() if named or report else body), report

    async def _compress(self, asked: dict[str, Any]) -> Report | None:
        """Shorten the prompt, where the request or the server's default says so."""
        wanted = asked.pop(COMPRESSION, None)
        try:
            found = await self._state.compressor(wanted)
            if found is None:
                return None
            return await compress_request(asked, *found, self._state.tokenizer)
        except CompressorError as error:
            raise RefusalError(400, str(error), COMPRESSION) from None

    def _name_method(self, asked: dict[str, Any]) -> bool:
        """Turn a model name that carries a method into the model and the method."""
        model = asked.get("model")
        found = self._state.resolve(model) if isinstance(model, str) else None
        if found is None:
            return False
        extra = asked.get("vllm_xargs") or {}
        if not isinstance(extra, dict):
            return False
        if extra.get(POLICY_KEY) is not None:
            raise RefusalError(
                400,
                f"the policy is given twice: in the model name {model!r} and in vllm_xargs",
                "model",
            )
        if asked.get("use_beam_search"):
            raise RefusalError(
                400, "a policy of its own cannot be combined with beam search", "model"
            )
        asked["model"] = found[0]
        asked["vllm_xargs"] = {**extra, POLICY_KEY: found[1]}
        return True


def _check_method(asked: dict[str, Any], where: str) -> None:
    """Refuse a bad method before a stream has begun: vLLM would answer 200 and then the error.

    Raises:
        RefusalError: naming what is allowed.

    """
    extra = asked.get("vllm_xargs")
    if isinstance(extra, dict) and extra.get(POLICY_KEY) is not None:
        try:
            check_method(extra[POLICY_KEY])
        except PolicyError as error:
            raise RefusalError(400, str(error), where) from None


async def _read_body(scope: Scope, receive: Receive, limit: int) -> bytes | None:
    """The whole body; None if the client left.

    Raises:
        RefusalError: it is over the limit.

    """
    refusal = RefusalError(413, f"the request is over {limit} bytes (--max-request-bytes)")
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value) > limit:
            raise refusal
    parts: list[bytes] = []
    total = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        total += len(part)
        if total > limit:
            raise refusal
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)


async def _message(receive: Receive) -> Message:
    return await receive()


def _ended(leaving: asyncio.Task[Message]) -> Receive:
    """A receive that gives what a task waits for; whoever stops waiting does not end the task."""

    async def receive() -> Message:
        return await asyncio.shield(leaving)

    return receive


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body once, then what the client really sends: its leaving."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _with_length(scope: Scope, body: bytes) -> Scope:
    headers = [(k, v) for k, v in scope["headers"] if k != b"content-length"]
    return {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}


def _log(scope: Scope, answer: Answer, seconds: float) -> None:
    """A line about a request; nothing of its prompt or answer."""
    headers = dict(scope["headers"])
    line = {
        "time": round(time.time(), 3),
        "request_id": headers.get(b"x-request-id", b"").decode(errors="replace")[:128] or answer.id,
        "path": scope["path"],
        "status": answer.status or None,  # none: the client left before the answer began
        "policy": answer.facts and answer.facts["policy"],
        "prompt_tokens": answer.usage.get("prompt_tokens"),
        "output_tokens": answer.usage.get("completion_tokens"),
        "kv_bytes": answer.facts and answer.facts["bytes"],
        "seconds": round(seconds, 4),
    }
    LOG.info(json.dumps(line))
