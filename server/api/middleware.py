"""Around vLLM's routes: limits, what a request asks for, and what was held.

A request's body is read once, up to a limit; a model name like ``NAME@snapkv(budget=512)`` becomes
the model and the method; in a completion's answer, and in a stream's last chunks, ``usage`` gets
``kv_cache``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.responses import Response

from server.api.answer import Answer
from server.api.asked import CURRENT, Asked
from server.api.body import ended, next_message, read_body, replay, with_length
from server.api.refusal import RefusalError
from server.api.translate import COMPLETIONS, translate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.types import ASGIApp, Receive, Scope, Send

    from server.api.state import ServerState

# the other routes of vLLM that occupy the engine; COMPLETIONS are counted with them
GENERATING = (
    *COMPLETIONS, "/v1/chat/completions/batch", "/v1/responses", "/v1/messages", "/v1/systemone",
    "/v1/decisions", "/invocations", "/inference/v1/generate", "/generative_scoring",
    "/cohere/v2/chat", "/v1/audio/transcriptions", "/v1/audio/translations",
)  # fmt: skip
CLIENT_LEFT = 499  # before the answer began, by nginx's custom
LOG = logging.getLogger("kvthrift.requests")


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
        asked = Asked()
        answer = Answer(asked, send, complete=path in COMPLETIONS)
        try:
            with self._counted(path):
                await self._answer(scope, receive, path, asked, answer)
            if not answer.status:  # nobody reads this; without it vLLM would count an error of ours
                await Response(status_code=CLIENT_LEFT)(scope, receive, send)
        except RefusalError as refusal:
            await refusal.response(path)(scope, receive, answer.send)
        finally:
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

    async def _answer(
        self, scope: Scope, receive: Receive, path: str, asked: Asked, answer: Answer
    ) -> None:
        body = await read_body(scope, receive, self._limits.max_body)
        if body is None:
            return
        leaving = asyncio.create_task(next_message(receive))  # no other message can come now
        work = asyncio.create_task(translate(body, path, self._state, asked))
        try:
            await asyncio.wait((leaving, work), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                changed, answer.compression = work.result()
                scope = scope if changed is body else with_length(scope, changed)
                token = CURRENT.set(asked)
                try:
                    await self._app(scope, replay(changed, ended(leaving)), answer.send)
                finally:
                    CURRENT.reset(token)
        finally:
            leaving.cancel()
            work.cancel()
            await asyncio.gather(leaving, work, return_exceptions=True)


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
