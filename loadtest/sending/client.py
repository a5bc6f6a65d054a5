"""One request to an OpenAI-compatible server, streamed, with the time of every token."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx

from loadtest.connect import connection
from loadtest.errors import NO_SERVER, LoadTestError
from loadtest.hide import hide, public_url
from loadtest.sending.answer import Answer
from loadtest.sending.records import OK, Record
from loadtest.sending.sse import EventParser

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from loadtest.workloads import Item

AFTER_END = 0.1  # seconds a stream is read on after its mark of the end, to keep the connection
NOT_YET = (502, 503, 504)  # of a server that starts, or of a proxy before it
ENDPOINTS = ("auto", "completions", "chat")


@dataclass(frozen=True)
class Target:
    """Whom to ask, and how.

    Attributes:
        url: e.g. ``http://127.0.0.1:8000``.
        model: name of the served model.
        endpoint: ``completions``, ``chat``, or ``auto``: what the workload's item wants.
        api_key: sent as bearer token; never written down.
        extra: added to every request's body, e.g. ``{"vllm_xargs": {...}}``.
        timeout: seconds a request may take.
        is_vllm: whether vLLM's extensions of the API may be used.
        longest: most tokens of prompt and answer; None: the server does not say.
        keep_thinking: whether the text of a model's thinking is written down.

    """

    url: str
    model: str
    endpoint: str = "auto"
    api_key: str | None = field(default=None, repr=False)
    extra: dict[str, Any] = field(default_factory=dict)
    timeout: float = 600.0
    is_vllm: bool = False
    longest: int | None = None
    keep_thinking: bool = False

    @property
    def headers(self) -> dict[str, str]:
        """Authorization, if there is a key."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def body(self, item: Item) -> tuple[str, dict[str, Any]]:
        """Route and JSON body of a greedy, streamed request."""
        chat = item.chat if self.endpoint == "auto" else self.endpoint == "chat"
        options: dict[str, Any] = {"include_usage": True}
        if self.is_vllm:
            options["continuous_usage_stats"] = True
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": item.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": options,
        }
        if item.exact_length and self.is_vllm:
            body |= {"ignore_eos": True, "min_tokens": body["max_tokens"]}
        if chat:
            body["messages"] = [{"role": "user", "content": item.prompt}]
        else:
            body["prompt"] = item.prompt
        return "/v1/chat/completions" if chat else "/v1/completions", body | self.extra


def find_target(url: str, model: str | None, **settings: Any) -> Target:
    """Ask the server for its models.

    Raises:
        LoadTestError: it is not there, wants a key, or does not serve ``model``.

    """
    target = Target(url.rstrip("/").removesuffix("/v1"), model or "", **settings)
    shown = public_url(url)
    served = _served(target, shown)
    name = model or next(iter(served), "")
    facts = served.get(name) or _unlisted(target, name)
    if facts is None:
        raise LoadTestError(f"{shown} does not serve {name!r}; it serves: {', '.join(served)}")
    return replace(
        target,
        model=name,
        is_vllm=facts.get("owned_by") == "vllm",
        longest=facts.get("max_model_len"),
    )


def _unlisted(target: Target, name: str) -> dict[str, Any] | None:
    """The card of a model that no list holds, as NAME@METHOD; None: there is none.

    Raises:
        LoadTestError: the server says what is wrong with the name.

    """
    url = f"{target.url}/v1/models/{quote(name, safe='')}"
    try:
        response = httpx.get(url, headers=target.headers, timeout=10.0, **connection(url))
        if response.status_code == 400:
            raise LoadTestError(f"model {name!r}: {response.json()['error']['message']}")
        card = response.json() if response.status_code == 200 else None
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None
    return card if isinstance(card, dict) and card.get("id") == name else None


def _served(target: Target, shown: str) -> dict[str, dict[str, Any]]:
    """The server's models, by name."""
    models = f"{target.url}/v1/models"
    settings = connection(target.url)
    try:
        response = httpx.get(models, headers=target.headers, timeout=10.0, **settings)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        why = hide(public_url(str(error) or type(error).__name__), target.api_key)
        via = f" through {public_url(str(settings['proxy'].url))}" if settings["proxy"] else ""
        raise LoadTestError(f"no server answers at {shown}{via}: {why}", NO_SERVER) from None
    if response.status_code in (401, 403):
        raise LoadTestError(
            f"{shown} answers {response.status_code}: it wants another API key "
            "(OPENAI_API_KEY or --api-key-file)",
            NO_SERVER,
        )
    if not response.is_success:
        raise LoadTestError(f"{shown}/v1/models answers {response.status_code}", NO_SERVER)
    try:
        return {str(m["id"]): m for m in response.json()["data"]}
    except (ValueError, KeyError, TypeError) as error:
        why = hide(str(error), target.api_key)
        raise LoadTestError(f"{shown}/v1/models is not OpenAI's: {why}", NO_SERVER) from None


def wait_for_server(
    url: str, seconds: float, on_wait: Callable[[float], None] = lambda _: None
) -> None:
    """Wait until a server answers anything but "not yet", be it the right one or not.

    Args:
        url: of the server.
        seconds: to wait at most.
        on_wait: called with the seconds waited so far, about once a second.

    Raises:
        LoadTestError: it did not in time.

    """
    models = f"{url.rstrip('/').removesuffix('/v1')}/v1/models"
    settings = connection(models)
    shown = public_url(url)
    begin = time.monotonic()
    why = ""
    while True:
        try:
            status = httpx.get(models, timeout=5.0, **settings).status_code
            if status not in NOT_YET:
                return
            why = f"it answers {status}"
        except httpx.InvalidURL as error:
            raise LoadTestError(f"{shown}: {error}", NO_SERVER) from None
        except httpx.HTTPError as error:
            why = public_url(str(error)) or type(error).__name__
        waited = time.monotonic() - begin
        if waited > seconds:
            raise LoadTestError(f"no server at {shown} after {seconds:g} s: {why}", NO_SERVER)
        on_wait(waited)
        time.sleep(1.0)


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
        except (httpx.TimeoutException, TimeoutError):
            record.fail("timeout", f"not whole after {self.target.timeout:g} s")
        except httpx.ConnectError as error:
            record.fail("connect", str(error))
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
        for name in ("error", "answer", "thinking"):
            if text := getattr(record, name):
                setattr(record, name, hide(text, self.target.api_key))

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
            text = b"".join([part async for part in parts])[:500].decode(errors="replace")
            record.fail(f"http_{response.status_code}", text.strip() or "no body")
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


def new_record(item: Item, scheduled: float) -> Record:
    """A record of an item that was not sent yet."""
    digest = hash_prompt(item)
    return Record(item.id, item.task, item.category, digest, dict(item.tags), scheduled=scheduled)


def hash_prompt(item: Item) -> str:
    """Twelve hexadecimal digits that name its prompt."""
    text = item.prompt.encode(errors="surrogatepass")
    return hashlib.sha256(text).hexdigest()[:12]
