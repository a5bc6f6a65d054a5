"""Compressing the prompt of an OpenAI request, and saying what that did."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.compression.base import (
    CompressorError,
    keep_words,
    split_words,
    tokens_by_word,
)

if TYPE_CHECKING:
    from server.compression.base import Compressor

FIELD = "prompt_compression"


class PromptCompression(BaseModel):
    """The request's field, and the server's default."""

    model_config = ConfigDict(extra="forbid")

    method: Literal["llmlingua-2", "selective", "none"]
    rate: float = Field(default=0.5, gt=0, le=1, description="share of the tokens to keep")
    keep_digits: bool = Field(default=True, description="words with a digit always stay")

    @classmethod
    def of(cls, value: object) -> PromptCompression:
        """Check what a request or an option holds.

        Raises:
            CompressorError: it is not right; names the part.

        """
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(p) for p in (FIELD, *first["loc"]))
            raise CompressorError(f"{place}: {first['msg']}") from None


class Report(BaseModel):
    """What ``usage.prompt_compression`` says; tokens are the served model's, without template."""

    method: str
    rate: float
    original_tokens: int
    compressed_tokens: int


class Tokenizer(Protocol):
    """The served model's, used off the event loop."""

    async def count(self, text: str) -> int:
        """Tokens of a text, without special ones."""

    async def spans(self, text: str) -> list[tuple[int, int]]:
        """Start and end of each token in the text."""


async def compress_request(
    asked: dict[str, Any], how: PromptCompression, compressor: Compressor, tokenizer: Tokenizer
) -> Report:
    """Shorten the prompt or the user messages of a request, in place.

    The last line, of a completion's prompt or of the last user message, is taken as the question
    and stays, as do system, assistant and tool messages.

    Args:
        asked: the request's body.
        how: what was asked for.
        compressor: scores words.
        tokenizer: of the served model.

    Raises:
        CompressorError: the prompt is not text, too long, or cannot be scored.

    """
    places = _places(asked)
    for place in places:
        _refuse_long(place.text, compressor)
    report = Report(method=how.method, rate=how.rate, original_tokens=0, compressed_tokens=0)
    for place in places:
        text, question = split_question(place.text) if place.last else (place.text, "")
        shorter = await _shorten(text, how, compressor, tokenizer)
        report.original_tokens += await tokenizer.count(place.text)
        place.holder[place.key] = shorter + question
        report.compressed_tokens += await tokenizer.count(place.text)
    return report


def _refuse_long(text: str, compressor: Compressor) -> None:
    if len(text) > compressor.most_letters:
        raise CompressorError(
            f"{compressor.name}: a text has {len(text)} letters, at most "
            f"{compressor.most_letters} are taken"
        )


async def _shorten(
    text: str, how: PromptCompression, compressor: Compressor, tokenizer: Tokenizer
) -> str:
    """The words that stay; what takes long is done off the event loop."""
    if how.rate == 1:
        return text
    words = await asyncio.to_thread(split_words, text, compressor.most_words)
    if not words:
        return text
    scores, spans = await compressor.scores(text, words), await tokenizer.spans(text)

    def kept() -> str:
        tokens = tokens_by_word(words, spans)
        return keep_words(words, scores, tokens, how.rate, keep_digits=how.keep_digits)

    return await asyncio.to_thread(kept) + text[words[-1].end :]


@dataclass(frozen=True)
class _Place:
    """A text that may be shortened, and where it stands in the request."""

    holder: Any
    key: Any
    last: bool  # its last line is the question

    @property
    def text(self) -> str:
        return str(self.holder[self.key])


def _places(asked: dict[str, Any]) -> list[_Place]:
    """Texts of a request, in order.

    Raises:
        CompressorError: it has none.

    """
    if "messages" in asked:
        return _message_places(asked["messages"])
    prompt = asked.get("prompt")
    if isinstance(prompt, str):
        return [_Place(asked, "prompt", last=True)]
    if isinstance(prompt, list) and prompt and all(isinstance(p, str) for p in prompt):
        return [_Place(prompt, index, last=True) for index in range(len(prompt))]
    raise CompressorError(
        f'{FIELD} needs a prompt of text, not of token ids; {{"method": "none"}} goes without'
    )


def _message_places(messages: object) -> list[_Place]:
    if not isinstance(messages, list):
        raise CompressorError(f"{FIELD} needs messages")
    found: list[_Place] = []
    for message in messages:
        if not isinstance(message, dict) or message.get("role") != "user":
            continue
        content = message.get("content")
        if isinstance(content, str):
            found.append(_Place(message, "content", last=False))
        elif isinstance(content, list):
            parts = [p for p in content if isinstance(p, dict) and isinstance(p.get("text"), str)]
            found += [_Place(part, "text", last=False) for part in parts]
    if found:
        found[-1] = replace(found[-1], last=True)
    return found


def split_question(text: str) -> tuple[str, str]:
    """What comes before the last line, and the last line (with what is blank around it)."""
    end = len(text.rstrip())
    cut = text.rfind("\n", 0, end)
    return (text[: cut + 1], text[cut + 1 :]) if cut >= 0 else ("", text)
