"""A request's body: read once up to a limit, and given again."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from server.api.refusal import RefusalError

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes | None:
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


async def next_message(receive: Receive) -> Message:
    """The next message; a coroutine, of which a task can be made."""
    return await receive()


def ended(leaving: asyncio.Task[Message]) -> Receive:
    """A receive that gives what a task waits for; whoever stops waiting does not end the task."""

    async def receive() -> Message:
        return await asyncio.shield(leaving)

    return receive


def replay(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body once, then what the client really sends: its leaving."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def with_length(scope: Scope, body: bytes) -> Scope:
    """The scope of a body that may be another one than came."""
    headers = [(k, v) for k, v in scope["headers"] if k != b"content-length"]
    return {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
