"""Around vLLM's completion routes: model names that carry a method, limits, and what was held.

vLLM's own handlers stay as they are. A request's body is read once, up to a limit; a model name
like ``NAME@snapkv(budget=512)`` becomes the model and ``vllm_xargs``; in the answer, and in a
stream's last chunks, ``usage`` gets ``kv_cache``.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse

from cache_policies.vllm_plugin.config import POLICY_KEY
from cache_policies.vllm_plugin.facts import KV_CACHE

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from server.api.state import ServerState

PATHS = ("/v1/completions", "/v1/chat/completions")
NOT_YET = ("prompt_compression",)  # named in the API's plan; never accepted and ignored


class RefusalError(Exception):
    """A request that is refused here, in OpenAI's error form."""

    def __init__(self, status: int, message: str, param: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, headers

    def response(self) -> JSONResponse:
        """The answer."""
        kinds = {413: "request_too_large", 429: "rate_limit_exceeded"}
        kind = kinds.get(self.status, "BadRequestError")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.status}
        return JSONResponse({"error": error}, self.status, self.headers)


class PolicyMiddleware:
    """ASGI middleware.

    Args:
        app: what it stands around.
        state: of this process.
        max_body: most bytes of a request's body.
        max_requests: most requests under way in this process; None: no limit.

    """

    def __init__(
        self, app: ASGIApp, state: ServerState, max_body: int, max_requests: int | None
    ) -> None:
        self._app, self._state = app, state
        self._max_body, self._max_requests = max_body, max_requests
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in PATHS:
            await self._app(scope, receive, send)
            return
        try:
            if self._max_requests is not None and self._running >= self._max_requests:
                message = f"{self._running} requests are under way already; try again later"
                raise RefusalError(429, message, **{"Retry-After": "1"})
            body = await _read_body(scope, receive, self._max_body)
            if body is None:
                return
            body = self._translate(body)
        except RefusalError as refusal:
            await refusal.response()(scope, receive, send)
            return
        self._running += 1
        try:
            answer = _Answer(self._state, send)
            await self._app(_with_length(scope, body), _replay(body, receive), answer.send)
        finally:
            self._running -= 1

    def _translate(self, body: bytes) -> bytes:
        """The body vLLM gets; what is not JSON is left to vLLM's own refusal."""
        try:
            asked = json.loads(body)
        except (ValueError, RecursionError):
            return body
        if not isinstance(asked, dict):
            return body
        for name in NOT_YET:
            if asked.get(name) is not None:
                raise RefusalError(400, f"{name} is not supported by this version", name)
        model = asked.get("model")
        found = self._state.resolve(model) if isinstance(model, str) else None
        if found is None:
            return body
        extra = asked.get("vllm_xargs") or {}
        if not isinstance(extra, dict):
            return body
        if extra.get(POLICY_KEY) is not None:
            raise RefusalError(
                400,
                f"the policy is given twice: in the model name {model!r} and in vllm_xargs",
                "model",
            )
        asked["model"] = found[0]
        asked["vllm_xargs"] = {**extra, POLICY_KEY: found[1]}
        return json.dumps(asked).encode()


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


class _Answer:
    """Passes an answer on, with ``usage.kv_cache`` put in."""

    def __init__(self, state: ServerState, send: Send) -> None:
        self._state, self._send = state, send
        self._start: Message | None = None
        self._parts: list[bytes] = []
        self._facts: dict[str, Any] | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if _is_json(message) and message["status"] == 200:
                self._start = message  # its length is not known yet
                return
        elif self._start is not None:
            self._parts.append(message.get("body", b""))
            if message.get("more_body"):
                return
            body = self._whole(b"".join(self._parts))
            start, self._start = self._start, None
            headers = [(k, v) for k, v in start["headers"] if k != b"content-length"]
            headers.append((b"content-length", str(len(body)).encode()))
            await self._send({**start, "headers": headers})
            message = {"type": "http.response.body", "body": body}
        elif b'"usage":{' in message.get("body", b""):
            message = {**message, "body": self._chunk(message["body"])}
        await self._send(message)

    def _whole(self, body: bytes) -> bytes:
        answer = json.loads(body)
        if not isinstance(answer, dict):
            return body
        found = self._take(answer)
        params = answer.get("kv_transfer_params")
        if isinstance(params, dict):
            # the way by which vLLM carries it; ours alone, since KV connectors are refused
            params.pop(KV_CACHE, None)
            answer["kv_transfer_params"] = params or None
        if found and isinstance(answer.get("usage"), dict):
            answer["usage"][KV_CACHE] = found
        return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()

    def _chunk(self, body: bytes) -> bytes:
        """One server-sent event, or several."""
        return b"\n\n".join(self._event(part) for part in body.split(b"\n\n"))

    def _event(self, event: bytes) -> bytes:
        if not event.startswith(b"data: {") or b'"usage":{' not in event:
            return event
        chunk = json.loads(event[6:])
        found = self._take(chunk)
        if found is None:
            return event
        chunk["usage"][KV_CACHE] = found
        return b"data: " + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode()

    def _take(self, answer: dict[str, Any]) -> dict[str, Any] | None:
        found = self._state.take(str(answer.get("id")))
        if found:
            self._facts = _together(found)
        return self._facts


def _together(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Facts of a response: one request's, or the sums over its prompts."""
    if len(found) == 1:
        return found[0]
    summed = {k: sum(f[k] for f in found) for k, v in found[0].items() if isinstance(v, int)}
    whole = sum((f["compression_ratio"] or 0) * f["bytes"] for f in found)
    ratio = round(whole / summed["bytes"], 4) if summed["bytes"] else None
    return {**found[0], **summed, "compression_ratio": ratio}


def _is_json(message: Message) -> bool:
    return any(
        name == b"content-type" and value.startswith(b"application/json")
        for name, value in message["headers"]
    )
