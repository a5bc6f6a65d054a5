"""Servers whose answers are known to the byte."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from typing import TYPE_CHECKING, Any

import httpx

from loadtest.sending.client import Client, Target, new_record
from loadtest.workloads import Item

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from loadtest.sending.records import Record

USAGE = {"prompt_tokens": 3, "completion_tokens": 2}
ITEM = Item("x", "t", "c", "hi", max_tokens=2)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def answered(
    parts: Sequence[bytes], *, kind: str = "text/event-stream", gap: float = 0.0, **settings: Any
) -> Record:
    """Send to a server that answers with these reads."""

    async def sent() -> AsyncIterator[bytes]:
        for part in parts:
            await asyncio.sleep(gap)
            yield part

    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=sent(), headers={"content-type": kind})

    async def run() -> Record:
        client = Client(Target("http://s", "m", **settings), time.monotonic())
        http = client._borrow()
        http._transport = httpx.MockTransport(answer)
        client._free.append(http)
        record = new_record(ITEM, 0.0)
        await client.send(ITEM, record)
        await client.close()
        return record

    return asyncio.run(run())


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def delta(usage: int | None = None, **fields: Any) -> bytes:
    """A chat's event, with vLLM's running count of tokens."""
    counted = {"usage": {**USAGE, "completion_tokens": usage}} if usage is not None else {}
    return event(choices=[{"index": 0, "delta": fields}], **counted)


END = event(choices=[], usage=USAGE) + b"data: [DONE]\n\n"


@contextlib.contextmanager
def holding(body: bytes, *, hold: float, head: bytes = HEAD) -> Iterator[str]:
    """A server that sends its answer in one chunk and then keeps the body open."""
    loop = asyncio.new_event_loop()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head + b"%x\r\n%s\r\n" % (len(body), body))
        await writer.drain()
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await asyncio.sleep(hold)
        writer.close()

    server = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0))
    port = server.sockets[0].getsockname()[1]
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        for task in asyncio.all_tasks(loop):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                loop.run_until_complete(task)
        server.close()
        loop.close()
