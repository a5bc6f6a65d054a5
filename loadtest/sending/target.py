"""Whom to ask: the server, its models, and what a request to it looks like."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx

from loadtest.connect import connection
from loadtest.errors import NO_SERVER, LoadTestError
from loadtest.hide import hide, public_url

if TYPE_CHECKING:
    from collections.abc import Callable

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
        if chat:
            body["messages"] = [{"role": "user", "content": item.prompt}]
        else:
            body["prompt"] = item.prompt
        body |= self.extra
        if item.exact_length and self.is_vllm:
            longest = (chat and body.get("max_completion_tokens")) or body["max_tokens"]
            body = {"ignore_eos": True, "min_tokens": longest} | body
        return "/v1/chat/completions" if chat else "/v1/completions", body


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
            why = hide(str(response.json()["error"]["message"]), target.api_key)
            raise LoadTestError(f"model {name!r}: {why}")
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
