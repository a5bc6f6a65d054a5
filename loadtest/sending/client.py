"""One request to an OpenAI-compatible server, streamed, with the time of every token."""

from __future__ import annotations

import asyncio
import hashlib
import json
import ssl
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx

from loadtest.errors import NO_SERVER, LoadTestError
from loadtest.sending.records import Record

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from loadtest.workloads import Item

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

    """

    url: str
    model: str
    endpoint: str = "auto"
    api_key: str | None = field(default=None, repr=False)
    extra: dict[str, Any] = field(default_factory=dict)
    timeout: float = 600.0
    is_vllm: bool = False
    longest: int | None = None

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
    try:
        response = httpx.get(f"{target.url}/v1/models", headers=target.headers, timeout=10.0)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise LoadTestError(f"no server answers at {url}: {error}", NO_SERVER) from None
    if response.status_code in (401, 403):
        raise LoadTestError(
            f"{url} answers {response.status_code}: it wants another API key "
            "(OPENAI_API_KEY or --api-key-file)",
            NO_SERVER,
        )
    try:
        response.raise_for_status()
        served = {str(m["id"]): m for m in response.json()["data"]}
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise LoadTestError(f"{url}/v1/models is not OpenAI's: {error}", NO_SERVER) from None
    name = model or next(iter(served), "")
    if name not in served:
        raise LoadTestError(f"{url} does not serve {name!r}; it serves: {', '.join(served)}")
    facts = served[name]
    return Target(
        target.url,
        name,
        is_vllm=facts.get("owned_by") == "vllm",
        longest=facts.get("max_model_len"),
        **settings,
    )


def wait_for_server(url: str, seconds: float) -> None:
    """Wait until a server answers anything but "not yet", be it the right one or not.

    Raises:
        LoadTestError: it did not in time.

    """
    models = f"{url.rstrip('/').removesuffix('/v1')}/v1/models"
    until = time.monotonic() + seconds
    why = ""
    while True:
        try:
            status = httpx.get(models, timeout=5.0).status_code
            if status not in NOT_YET:
                return
            why = f"it answers {status}"
        except httpx.InvalidURL as error:
            raise LoadTestError(f"{url}: {error}", NO_SERVER) from None
        except httpx.HTTPError as error:
            why = str(error) or type(error).__name__
        if time.monotonic() > until:
            raise LoadTestError(f"no server at {url} after {seconds:g} s: {why}", NO_SERVER)
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
        self._tls = ssl.create_default_context()

    def _borrow(self) -> httpx.AsyncClient:
        if self._free:
            return self._free.pop()
        target = self.target
        made = httpx.AsyncClient(
            base_url=target.url,
            # compressed events would wait for each other
            headers={**target.headers, "Accept-Encoding": "identity"},
            timeout=httpx.Timeout(target.timeout, connect=min(30.0, target.timeout)),
            verify=self._tls,
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
        try:
            # all that can be done before the clock starts
            request = self._request(http, item)
            record.sent = self.now()
            async with asyncio.timeout(self.target.timeout):
                response = await http.send(request, stream=True)
                try:
                    await self._receive(response, record)
                finally:
                    await response.aclose()
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
            self._free.append(http)

    def _request(self, http: httpx.AsyncClient, item: Item) -> httpx.Request:
        route, body = self.target.body(item)
        headers = {"Content-Type": "application/json", "X-Request-Id": quote(item.id)}
        content = json.dumps(body).encode()
        return http.build_request("POST", route, content=content, headers=headers)

    async def _receive(self, response: httpx.Response, record: Record) -> None:
        if response.is_success:
            await self._read(response, record)
            return
        text = (await response.aread())[:500].decode(errors="replace")
        record.fail(f"http_{response.status_code}", text.strip() or "no body")

    async def _read(self, response: httpx.Response, record: Record) -> None:
        done = False
        async for when, data in _events(response, self.now):
            if data == "[DONE]":
                done = True
                continue
            try:
                event = json.loads(data)
                _read_event(event, when, record, counts_events=self.target.is_vllm)
            except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
                    RecursionError) as error:  # fmt: skip
                record.fail("invalid_sse", f"{type(error).__name__}: {error} in {data[:200]!r}")
            if record.error_kind:
                return
        if not done:
            record.fail("stream_cut", "the stream ended without [DONE]")
        elif record.output_tokens is None:
            record.fail("no_usage", "the stream has no usage field: tokens cannot be counted")
        if len(record.event_tokens) != len(record.events):
            record.event_tokens.clear()


def new_record(item: Item, scheduled: float) -> Record:
    """A record of an item that was not sent yet."""
    digest = hash_prompt(item)
    return Record(item.id, item.task, item.category, digest, dict(item.tags), scheduled=scheduled)


def hash_prompt(item: Item) -> str:
    """Twelve hexadecimal digits that name its prompt."""
    text = item.prompt.encode(errors="surrogatepass")
    return hashlib.sha256(text).hexdigest()[:12]


async def _events(
    response: httpx.Response, now: Callable[[], float]
) -> AsyncIterator[tuple[float, str]]:
    """Yield time of arrival and data of every server-sent event.

    All events of one read arrived together and share its time.
    """
    rest = b""
    async for part in response.aiter_raw():
        when = now()
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield when, line[5:].strip().decode(errors="replace")
    if rest.startswith(b"data:"):
        yield now(), rest[5:].strip().decode(errors="replace")


def _read_event(event: dict[str, Any], when: float, record: Record, *, counts_events: bool) -> None:
    """Put what an event says into the record.

    Args:
        event: parsed data of the event.
        when: it arrived.
        record: to complete.
        counts_events: whether the server counts tokens in every event; others may put their only
            usage into an event with choices.

    """
    if error := event.get("error"):
        record.fail("server_error", str(error)[:500])
        return
    brought = False
    choices = event.get("choices") or ()
    for choice in choices:
        delta = choice.get("delta") or {}
        text = choice.get("text") or delta.get("content") or delta.get("reasoning_content")
        if text:
            record.answer += text
        brought = brought or bool(text or delta.get("tool_calls"))
        record.finish_reason = choice.get("finish_reason") or record.finish_reason
    usage = event.get("usage")
    if usage and usage.get("completion_tokens") is not None:
        new = int(usage["completion_tokens"]) - (record.output_tokens or 0)
        # vLLM counts in every event; a token may bring no text yet (half a character)
        brought = brought or (counts_events and new > 0 and bool(choices))
        record.usage = usage
        record.prompt_tokens = int(usage.get("prompt_tokens") or 0)
        record.output_tokens = int(usage["completion_tokens"])
        details = usage.get("prompt_tokens_details") or {}
        record.cached_tokens = details.get("cached_tokens")
        if counts_events and choices and brought:
            record.event_tokens.append(new)
    if brought:
        record.events.append(when)
