"""An OpenAI-compatible server seen from outside: streamed completions with token times."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class Answer:
    """One finished request.

    Attributes:
        text: what was generated.
        prompt_tokens: as the server counted them.
        output_tokens: as the server counted them.
        sent: monotonic seconds when the request was sent.
        arrivals: monotonic seconds of every chunk that carried text.
        finished: monotonic seconds when the stream ended.
        error: what went wrong, or None.

    """

    text: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    sent: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    finished: float = 0.0
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Seconds from sending to the first text."""
        return self.arrivals[0] - self.sent

    @property
    def tpot(self) -> float | None:
        """Mean seconds per output token after the first; None with fewer than two."""
        if self.output_tokens < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.output_tokens - 1)


class Client:
    """A server and one of its models.

    Args:
        base_url: e.g. ``http://127.0.0.1:8000``.
        timeout: seconds a request may take.

    """

    def __init__(self, base_url: str, timeout: float = 600.0) -> None:
        # Long prompts: one connection per stream, no pool that would queue them here.
        limits = httpx.Limits(max_connections=None)
        self._http = httpx.AsyncClient(base_url=base_url, timeout=timeout, limits=limits)
        self._model: str | None = None

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def model(self) -> str:
        """Name of the served model."""
        if self._model is None:
            response = await self._http.get("/v1/models")
            response.raise_for_status()
            self._model = str(response.json()["data"][0]["id"])
        return self._model

    async def count_tokens(self, text: str) -> int:
        """Tokens of a text, by the server's tokenizer."""
        body = {"model": await self.model(), "prompt": text, "add_special_tokens": False}
        response = await self._http.post("/tokenize", json=body)
        response.raise_for_status()
        return int(response.json()["count"])

    async def metrics(self) -> str:
        """The server's Prometheus text."""
        response = await self._http.get("/metrics", timeout=10.0)
        response.raise_for_status()
        return response.text

    async def complete(self, prompt: str, max_tokens: int) -> Answer:
        """Greedy streamed completion; a failure is an Answer with ``error``, never an exception."""
        body = {
            "model": await self.model(),
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        answer = Answer(sent=time.monotonic())
        try:
            async with self._http.stream("POST", "/v1/completions", json=body) as response:
                if response.is_error:
                    await response.aread()
                    answer.error = f"HTTP {response.status_code}: {response.text[:300]}"
                    return answer
                async for line in response.aiter_lines():
                    _take(line, answer)
        except (httpx.HTTPError, json.JSONDecodeError) as error:
            answer.error = f"{type(error).__name__}: {error}"
        answer.finished = time.monotonic()
        if answer.error is None and not answer.arrivals:
            answer.error = "the stream carried no text"
        return answer


def _take(line: str, answer: Answer) -> None:
    if not line.startswith("data:") or line.endswith("[DONE]"):
        return
    event: dict[str, Any] = json.loads(line.removeprefix("data:"))
    if "error" in event:
        answer.error = str(event["error"])
        return
    for choice in event["choices"]:
        if choice["text"]:
            answer.text += choice["text"]
            answer.arrivals.append(time.monotonic())
    if usage := event.get("usage"):
        answer.prompt_tokens = usage["prompt_tokens"]
        answer.output_tokens = usage["completion_tokens"]
