"""A completion's answer on its way to the client, with what its request held put in."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from cache_policies.vllm_plugin.facts import KV_CACHE
from server.compression.request import FIELD as COMPRESSION

if TYPE_CHECKING:
    from starlette.types import Message, Send

    from server.api.state import ServerState
    from server.compression.request import Report


class Answer:
    """Passes an answer on; that of a completion with ``usage.kv_cache`` put in."""

    def __init__(self, state: ServerState, send: Send, *, complete: bool) -> None:
        self._state, self._send, self.complete = state, send, complete
        self._start: Message | None = None
        self._parts: list[bytes] = []
        self._found: list[dict[str, Any]] = []
        self.facts: dict[str, Any] | None = None
        self.compression: Report | None = None
        self.status = 0
        self.id: str | None = None
        self.usage: dict[str, Any] = {}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self.complete and _is_json(message) and message["status"] == 200:
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
        elif self.complete and self.status == 200:
            message = self._pass(message)
        await self._send(message)

    def _pass(self, message: Message) -> Message:
        """A part of a stream; only those with a usage field are touched."""
        body = message.get("body", b"")
        if self.id is None and body.startswith(b'data: {"id":"'):
            self.id = body[13 : body.index(b'"', 13)].decode()
        if b'"usage":{' not in body:
            return message
        return {**message, "body": self._chunk(body)}

    def finish(self) -> None:
        """Take what no part of the answer had a place for."""
        if self.id is not None:
            self._take({"id": self.id})

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
        self._complete(answer, found)
        return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()

    def _chunk(self, body: bytes) -> bytes:
        """One server-sent event, or several."""
        return b"\n\n".join(self._event(part) for part in body.split(b"\n\n"))

    def _event(self, event: bytes) -> bytes:
        if not event.startswith(b"data: {") or b'"usage":{' not in event:
            return event
        chunk = json.loads(event[6:])
        found = self._take(chunk)
        self._complete(chunk, found)
        return b"data: " + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode()

    def _complete(self, answer: dict[str, Any], held: dict[str, Any] | None) -> None:
        usage = answer.get("usage")
        if not isinstance(usage, dict):
            return
        if held:
            usage[KV_CACHE] = held
        if self.compression:
            usage[COMPRESSION] = self.compression.model_dump()
        self.usage = usage

    def _take(self, answer: dict[str, Any]) -> dict[str, Any] | None:
        self.id = str(answer.get("id"))
        self._found += self._state.take(self.id)
        if self._found:
            self.facts = _together(self._found)
        return self.facts


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
