"""One request to an OpenAI-compatible server, streamed, with the time of every token."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from contextlib import suppress
from typing import TYPE_CHECKING
from urllib.parse import quote

import httpx

from loadtest.connect import connection
from loadtest.hide import hide
from loadtest.sending.answer import Answer
from loadtest.sending.records import OK, Record
from loadtest.sending.sse import EventParser
from loadtest.sending.target import ENDPOINTS, Target, find_target, wait_for_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from loadtest.workloads import Item

__all__ = [
    "ENDPOINTS", "Client", "Target", "find_target", "hash_prompt", "new_record", "wait_for_server",
]  # fmt: skip

AFTER_END = 0.1  # seconds a stream is read on after its mark of the end, to keep the connection
SECRET = 8  # characters of a key that nobody says by accident


class Client:
    """Sends items to a target.

    Args:
        target: whom to ask.
        start: monotonic seconds that count as 0 in the records.

    """

    def __init__(self, target: Target, start: float) -> None:
        self.target = target
        self._start = start
        # One httpx client for every request under way. A shared pool asks all its connections
        # for each request: with 64 streams that took over a second, seen as time to first token.
        self._free: list[httpx.AsyncClient] = []
        self._all: list[httpx.AsyncClient] = []
        self._connection = connection(target.url)

    def _borrow(self) -> httpx.AsyncClient:
        if self._free:
            return self._free.pop()
        target = self.target
        made = httpx.AsyncClient(
            base_url=target.url,
            # compressed events would wait for each other
            headers={**target.headers, "Accept-Encoding": "identity"},
            timeout=httpx.Timeout(target.timeout, connect=min(30.0, target.timeout)),
            **self._connection,
        )
        self._all.append(made)
        return made

    def prepare(self, connections: int) -> None:
        """Make clients ahead of the first requests."""
        made = [self._borrow() for _ in range(connections)]
        self._free += made

    async def close(self) -> None:
        """Close all connections."""
        for http in self._all:
            await http.aclose()

    def restart(self, now: float) -> None:
        """Let it be ``now`` seconds after the start."""
        self._start = time.monotonic() - now

    def now(self) -> float:
        """Monotonic seconds since the start."""
        return time.monotonic() - self._start

    async def send(self, item: Item, record: Record) -> None:
        """Send an item and complete its record. A failure is written there, never raised."""
        http = self._borrow()
        answer = Answer(
            record,
            counts_events=self.target.is_vllm,
            keep_thinking=self.target.keep_thinking,
            key=self.target.api_key,
        )
        response: httpx.Response | None = None
        rest: AsyncIterator[bytes] | None = None
        try:
            # all that can be done before the clock starts
            request = self._request(http, item)
            record.sent = self.now()
            async with asyncio.timeout(self.target.timeout):
                response = await http.send(request, stream=True)
                parts = response.aiter_bytes()
                await self._receive(response, parts, record, answer)
                rest = parts
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            record.fail("connect", str(error) or type(error).__name__)
        except (httpx.TimeoutException, TimeoutError):
            record.fail("timeout", f"not whole after {self.target.timeout:g} s")
        except httpx.HTTPError as error:
            kind = "stream_cut" if record.events else "connection"
            record.fail(kind, f"{type(error).__name__}: {error}")
        except Exception as error:  # whatever one request does, the others go on
            record.fail("client", f"{type(error).__name__}: {error}")
        finally:
            record.finished = self.now()
            answer.close()
            self._keep_out(record)
            await _leave(response, rest if record.status == OK else None)
            self._free.append(http)

    def _keep_out(self, record: Record) -> None:
        """Keep the key out of what is written down, wherever a server repeats it."""
        key = self.target.api_key or ""
        record.error = record.error and hide(record.error, key)
        if len(key) >= SECRET:  # a short one, EMPTY say, may be a word of the answer
            record.answer, record.thinking = hide(record.answer, key), hide(record.thinking, key)

    def _request(self, http: httpx.AsyncClient, item: Item) -> httpx.Request:
        route, body = self.target.body(item)
        headers = {"Content-Type": "application/json", "X-Request-Id": quote(item.id)}
        content = json.dumps(body).encode()
        return http.build_request("POST", route, content=content, headers=headers)

    async def _receive(
        self, response: httpx.Response, parts: AsyncIterator[bytes], record: Record, answer: Answer
    ) -> None:
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not response.is_success:
            text = b"".join([part async for part in parts]).decode(errors="replace")
            shown = hide(text, self.target.api_key)[:500].strip()
            record.fail(f"http_{response.status_code}", shown or "no body")
        elif kind == "application/json":
            answer.whole(b"".join([part async for part in parts]))
            self._check_usage(record)
        else:
            await self._read(parts, record, answer)

    async def _read(self, parts: AsyncIterator[bytes], record: Record, answer: Answer) -> None:
        """Read a stream to its mark of the end: what its server does afterwards is not awaited."""
        parser = EventParser()
        ended = False
        while not ended:
            part = await anext(parts, None)
            when = self.now()  # all events of one read arrived together
            for event in parser.end() if part is None else parser.feed(part):
                if event.is_end:
                    self._check_usage(record)
                    return
                answer.take(event, when)
                if record.error_kind:
                    return
            ended = part is None
        record.fail("stream_cut", "the stream ended without [DONE]")

    @staticmethod
    def _check_usage(record: Record) -> None:
        if record.status == OK and (
            record.output_tokens is None or (record.events and not record.output_tokens)
        ):
            record.fail("no_usage", "the answer has no usage field: tokens cannot be counted")


async def _leave(response: httpx.Response | None, rest: AsyncIterator[bytes] | None) -> None:
    """Close an answer. One read to its end leaves its connection to the next request."""
    if response is None:
        return
    with suppress(httpx.HTTPError, TimeoutError):
        async with asyncio.timeout(AFTER_END):
            while rest is not None and await anext(rest, None) is not None:
                pass
    await response.aclose()
    # its stream and it hold each other, and the prompt, until garbage is collected
    response.stream = httpx.ByteStream(b"")


def new_record(item: Item, scheduled: float) -> Record:
    """A record of an item that was not sent yet."""
    digest = hash_prompt(item)
    return Record(item.id, item.task, item.category, digest, dict(item.tags), scheduled=scheduled)


def hash_prompt(item: Item) -> str:
    """Twelve hexadecimal digits that name its prompt."""
    text = item.prompt.encode(errors="surrogatepass")
    return hashlib.sha256(text).hexdigest()[:12]
