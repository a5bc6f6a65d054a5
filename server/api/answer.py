"""A completion's answer on its way to the client, with what its request held put in."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from cache_policies.vllm_plugin.facts import KV_CACHE
from server.api.refusal import RefusalError
from server.compression.request import FIELD as COMPRESSION

if TYPE_CHECKING:
    from starlette.types import Message, Send

    from server.api.asked import Asked
    from server.compression.request import Report


class Answer:
    """Passes an answer on; that of a completion with ``usage.kv_cache`` put in.

    A stream under a method of its own begins with its first event: until then the engine may refuse
    it, which is an HTTP 400 as it is without a stream, and not an event after a 200.

    Args:
        asked: the request, on which is noted what it held.
        send: to the client.
        complete: whether it is a completion.

    """

    def __init__(self, asked: Asked, send: Send, *, complete: bool) -> None:
        self._asked, self._send, self._complete = asked, send, complete
        self._start: Message | None = None  # of an answer that has not begun
        self._stream = self._refused = False
        self._parts: list[bytes] = []
        self.compression: Report | None = None
        self.status = 0
        self.id: str | None = None
        self.usage: dict[str, Any] = {}

    async def send(self, message: Message) -> None:
        if self._refused:  # what vLLM makes of it
            return
        if message["type"] == "http.response.start":
            if self._complete and message["status"] == 200:
                self._stream = not _is_json(message)
                if not self._stream or self._asked.method is not None:
                    self._start = message
                    return
            self.status = message["status"]
        elif self._start is not None and self._stream:
            start, self._start = self._start, None
            if self._asked.refusal is not None:
                await self._refuse(self._asked.refusal)
                return
            await self._begin(start)
            message = self._pass(message)
        elif self._start is not None:
            self._parts.append(message.get("body", b""))
            if message.get("more_body"):
                return
            body = self._whole(b"".join(self._parts))
            start, self._start = self._start, None
            headers = [(k, v) for k, v in start["headers"] if k != b"content-length"]
            headers.append((b"content-length", str(len(body)).encode()))
            await self._begin({**start, "headers": headers})
            message = {"type": "http.response.body", "body": body}
        elif self._complete and self.status == 200:
            message = self._pass(message)
        await self._send(message)

    async def _begin(self, start: Message) -> None:
        self.status = start["status"]
        await self._send(start)

    async def _refuse(self, reason: str) -> None:
        self._refused = True
        found = RefusalError(400, reason).response()
        start = {"type": "http.response.start", "status": 400, "headers": found.raw_headers}
        await self._begin(start)
        await self._send({"type": "http.response.body", "body": found.body})

    def _pass(self, message: Message) -> Message:
        """A part of a stream; only those with a usage field are touched."""
        body = message.get("body", b"")
        if self.id is None and body.startswith(b'data: {"id":"'):
            self.id = body[13 : body.index(b'"', 13)].decode()
        if b'"usage":{' not in body:
            return message
        return {**message, "body": self._chunk(body)}

    @property
    def facts(self) -> dict[str, Any] | None:
        """What the request's ended prompts held: one's, or the sums."""
        return _together(self._asked.facts) if self._asked.facts else None

    def _whole(self, body: bytes) -> bytes:
        answer = json.loads(body)
        if not isinstance(answer, dict):
            return body
        params = answer.get("kv_transfer_params")
        if isinstance(params, dict):
            # the way by which vLLM carries it; ours alone, since KV connectors are refused
            params.pop(KV_CACHE, None)
            answer["kv_transfer_params"] = params or None
        self._fill(answer)
        return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()

    def _chunk(self, body: bytes) -> bytes:
        """One server-sent event, or several."""
        return b"\n\n".join(self._event(part) for part in body.split(b"\n\n"))

    def _event(self, event: bytes) -> bytes:
        if not event.startswith(b"data: {") or b'"usage":{' not in event:
            return event
        chunk = json.loads(event[6:])
        self._fill(chunk)
        return b"data: " + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode()

    def _fill(self, answer: dict[str, Any]) -> None:
        self.id = str(answer.get("id"))
        usage = answer.get("usage")
        if not isinstance(usage, dict):
            return
        if held := self.facts:
            usage[KV_CACHE] = held
        if self.compression:
            usage[COMPRESSION] = self.compression.model_dump()
        self.usage = usage


def _together(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Facts of a response: one request's, or the sums over its prompts."""
    if len(found) == 1:
        return found[0]
    summed = {k: sum(f[k] for f in found) for k, v in found[0].items() if isinstance(v, int)}
    known = [f for f in found if f["compression_ratio"] is not None]
    held = sum(f["bytes"] for f in known)
    whole = sum(f["compression_ratio"] * f["bytes"] for f in known)
    ratio = round(whole / held, 4) if held else None
    read = [(f["read_share"], f["prompt_tokens"]) for f in found if "read_share" in f]
    tokens = sum(n for _, n in read)
    share = {"read_share": round(sum(s * n for s, n in read) / tokens, 4)} if tokens else {}
    return {**found[0], **summed, "compression_ratio": ratio, **share}


def _is_json(message: Message) -> bool:
    return any(
        name == b"content-type" and value.startswith(b"application/json")
        for name, value in message["headers"]
    )
