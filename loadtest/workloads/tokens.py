"""Counting and cutting prompts in tokens, where possible in those of the served model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import httpx

from loadtest.errors import LoadTestError
from loadtest.hide import public_url

if TYPE_CHECKING:
    from collections.abc import Sequence


class Tokenizer(Protocol):
    """What workloads need to know of a tokenizer."""

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, without special tokens."""

    def cut_middle(self, text: str, tokens: int) -> str:
        """The text if it has at most ``tokens`` tokens, else its first and last half of them."""


def middle(ids: list[int], tokens: int) -> tuple[list[int], list[int]]:
    """First and last half of ``tokens`` token ids."""
    half = tokens // 2
    return ids[:half], ids[len(ids) - (tokens - half) :]


class ApproximateTokenizer:
    """Four characters a token: for servers that tell nothing of their tokens."""

    def count(self, texts: Sequence[str]) -> list[int]:
        return [-(-len(text) // 4) for text in texts]

    def cut_middle(self, text: str, tokens: int) -> str:
        if len(text) <= 4 * tokens:
            return text
        half = 2 * tokens
        return text[:half] + text[len(text) - half :]


class LocalTokenizer:
    """A tokenizer of transformers, from a folder or a hub name."""

    def __init__(self, name: str) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise LoadTestError(f"--tokenizer {name}: needs transformers ({error})") from None
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise LoadTestError(f"--tokenizer {name}: {error}") from None

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def count(self, texts: Sequence[str]) -> list[int]:
        return [len(self._encode(text)) for text in texts]

    def cut_middle(self, text: str, tokens: int) -> str:
        ids = self._encode(text)
        if len(ids) <= tokens:
            return text
        return "".join(
            self._tokenizer.decode(part, skip_special_tokens=True) for part in middle(ids, tokens)
        )


class ServerTokenizer:
    """The served model's own, over vLLM's ``/tokenize`` and ``/detokenize``.

    Raises:
        LoadTestError: the server has no such routes.

    """

    def __init__(self, http: httpx.Client, model: str) -> None:
        self._http = http
        self._model = model
        self._known: dict[str, int] = {}

    def _post(self, route: str, **body: Any) -> Any:
        try:
            response = self._http.post(route, json={"model": self._model, **body})
            response.raise_for_status()
            return response.json()
        except (httpx.HTTPError, ValueError) as error:
            why = public_url(str(error).partition("\n")[0])
            raise LoadTestError(
                f"the server cannot count tokens ({route}: {why}); "
                "give --tokenizer FOLDER or --tokenizer approximate"
            ) from None

    def _encode(self, text: str) -> list[int]:
        answer = self._post("/tokenize", prompt=text, add_special_tokens=False)
        ids = answer.get("tokens") if isinstance(answer, dict) else None
        if not isinstance(ids, list) or (text.strip() and not ids):
            raise LoadTestError(
                "the server's /tokenize is not vLLM's; give --tokenizer FOLDER or approximate"
            )
        return ids

    def count(self, texts: Sequence[str]) -> list[int]:
        for text in texts:
            if text not in self._known:
                self._known[text] = len(self._encode(text))
        return [self._known[text] for text in texts]

    def cut_middle(self, text: str, tokens: int) -> str:
        ids = self._encode(text)
        if len(ids) <= tokens:
            return text
        return "".join(
            str(self._post("/detokenize", tokens=part)["prompt"]) for part in middle(ids, tokens)
        )
