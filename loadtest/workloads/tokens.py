"""Counting and cutting prompts in tokens, where possible in those of the served model."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Protocol

import httpx

from loadtest.errors import LoadTestError
from loadtest.hide import public_url

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CHAT_ROOM = 96  # tokens of a chat template, where nobody tells
TEMPLATE_OPTIONS = ("chat_template", "chat_template_kwargs", "add_generation_prompt",
                    "continue_final_message", "add_special_tokens")  # fmt: skip


class Tokenizer(Protocol):
    """What workloads need to know of a tokenizer."""

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, without special tokens."""

    def count_sent(self, text: str, chat: bool) -> int:
        """Tokens of a prompt as the server takes it.

        Args:
            text: the prompt.
            chat: whether the workload wants the model's chat template around it; otherwise, the
                special tokens of a completion.

        """

    def cut_middle(self, text: str, tokens: int) -> str:
        """The text if it has at most ``tokens`` tokens, else its first and last half of them."""


def middle(ids: list[int], tokens: int) -> tuple[list[int], list[int]]:
    """First and last half of ``tokens`` token ids."""
    half = tokens // 2
    return ids[:half], ids[len(ids) - (tokens - half) :]


class _Endpoint(ABC):
    """Counts a prompt once, by the endpoint it goes to."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._sent: dict[tuple[bytes, bool], int] = {}

    def count_sent(self, text: str, chat: bool) -> int:
        chat = chat if self._endpoint == "auto" else self._endpoint == "chat"
        key = hashlib.sha256(text.encode(errors="surrogatepass")).digest(), chat
        if key not in self._sent:
            self._sent[key] = self._chat(text) if chat else self._completion(text)
        return self._sent[key]

    @abstractmethod
    def _chat(self, text: str) -> int:
        """Tokens of a prompt sent as one message of a chat."""

    @abstractmethod
    def _completion(self, text: str) -> int:
        """Tokens of a prompt sent as it is."""


class ApproximateTokenizer(_Endpoint):
    """Four characters a token: for servers that tell nothing of their tokens."""

    def __init__(self, endpoint: str = "auto") -> None:
        super().__init__(endpoint)

    def count(self, texts: Sequence[str]) -> list[int]:
        return [-(-len(text) // 4) for text in texts]

    def _chat(self, text: str) -> int:
        return self.count([text])[0] + CHAT_ROOM

    def _completion(self, text: str) -> int:
        return self.count([text])[0] + 1

    def cut_middle(self, text: str, tokens: int) -> str:
        if len(text) <= 4 * tokens:
            return text
        half = 2 * tokens
        return text[:half] + text[len(text) - half :]


class LocalTokenizer(_Endpoint):
    """A tokenizer of transformers, from a folder or a hub name."""

    def __init__(self, name: str, endpoint: str = "auto") -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise LoadTestError(f"--tokenizer {name}: needs transformers ({error})") from None
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise LoadTestError(f"--tokenizer {name}: {error}") from None
        super().__init__(endpoint)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def count(self, texts: Sequence[str]) -> list[int]:
        return [len(self._encode(text)) for text in texts]

    def _completion(self, text: str) -> int:
        return len(self._tokenizer.encode(text))

    def _chat(self, text: str) -> int:
        if not self._tokenizer.chat_template:
            return len(self._encode(text)) + CHAT_ROOM
        messages = [{"role": "user", "content": text}]
        whole = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return len(self._encode(whole))

    def cut_middle(self, text: str, tokens: int) -> str:
        ids = self._encode(text)
        if len(ids) <= tokens:
            return text
        return "".join(
            self._tokenizer.decode(part, skip_special_tokens=True) for part in middle(ids, tokens)
        )


class ServerTokenizer(_Endpoint):
    """The served model's own, over vLLM's ``/tokenize`` and ``/detokenize``.

    Args:
        http: asks the server.
        model: name of the served model.
        endpoint: as of ``Target``.
        extra: what is added to each request; options of the chat template are asked for here too.

    Raises:
        LoadTestError: the server has no such routes.

    """

    def __init__(
        self,
        http: httpx.Client,
        model: str,
        endpoint: str = "auto",
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(endpoint)
        self._http = http
        self._model = model
        self._options = {k: v for k, v in (extra or {}).items() if k in TEMPLATE_OPTIONS}
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

    def _encode(self, text: str, **options: Any) -> list[int]:
        answer = self._post("/tokenize", prompt=text, **{"add_special_tokens": False, **options})
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

    def _completion(self, text: str) -> int:
        special = self._options.get("add_special_tokens", True)
        return len(self._encode(text, add_special_tokens=special))

    def _chat(self, text: str) -> int:
        messages = [{"role": "user", "content": text}]
        try:
            found = self._post("/tokenize", messages=messages, **self._options)
            return len(found["tokens"])
        except (LoadTestError, LookupError, TypeError):
            # a server without chat template, whose own answer to the request says more
            return len(self._encode(text)) + CHAT_ROOM

    def cut_middle(self, text: str, tokens: int) -> str:
        ids = self._encode(text)
        if len(ids) <= tokens:
            return text
        return "".join(
            str(self._post("/detokenize", tokens=part)["prompt"]) for part in middle(ids, tokens)
        )
