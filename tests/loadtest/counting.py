"""Tokenizers that count what they are asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loadtest.workloads.tokens import middle

if TYPE_CHECKING:
    from collections.abc import Sequence

CHAT = 12  # tokens of the chat template
SPECIAL = 1  # at the beginning of a completion


class Words:
    """A token is a word.

    Attributes:
        calls: how often it was asked.
        characters: how much text it was given.

    """

    def __init__(self) -> None:
        self.calls = 0
        self.characters = 0

    def count(self, texts: Sequence[str]) -> list[int]:
        self.calls += len(texts)
        self.characters += sum(map(len, texts))
        return [self.tokens(t) for t in texts]

    def count_sent(self, text: str, chat: bool) -> int:
        return self.count([text])[0] + (CHAT if chat else SPECIAL)

    def tokens(self, text: str) -> int:
        return len(text.split())

    def cut_middle(self, text: str, tokens: int) -> str:
        words = text.split(" ")
        kept = [words[i] for part in middle(list(range(len(words))), tokens) for i in part]
        return text if len(words) <= tokens else " ".join(kept)


class Digits(Words):
    """Words and single digits, as most tokenizers have them: text is not equally dense."""

    def tokens(self, text: str) -> int:
        return len(text.split()) + sum(c.isdigit() or c in ".,:" for c in text)
