"""Texts of a wanted number of tokens: the built-in ones, or the files of a folder."""

from __future__ import annotations

import random
import re
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

from loadtest.errors import LoadTestError
from loadtest.workloads.haystack import ESSAY, NOISE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loadtest.workloads.tokens import Tokenizer

SAMPLE = 64  # sentences
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


def sentences(source: str, seed: int | str) -> list[str]:
    """Sentences of ``noise``, ``essay`` (in an order fixed by the seed) or a folder of .txt files.

    A folder is read in the order of its file names, since a directory listing has none.

    Raises:
        LoadTestError: no such folder, or nothing in it.

    """
    if source == "noise":
        return list(NOISE)
    if source == "essay":
        pool = list(ESSAY)
        random.Random(f"{seed}-essay").shuffle(pool)
        return pool
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise LoadTestError(f"text {source!r} is neither noise, essay nor a folder")
    files = sorted(folder.glob("*.txt"))
    found = [
        part.strip()
        for file in files
        for part in _SENTENCE.split(file.read_text(encoding="utf-8-sig", errors="replace"))
        if part.strip()
    ]
    if not found:
        raise LoadTestError(f"folder {source} holds no .txt file with text")
    return found


class Filler:
    """Text of a wanted number of tokens, chosen by its characters.

    How many characters a token has is measured once, on the beginning of the pool, so that long
    texts cost the tokenizer no more calls than short ones.

    Args:
        pool: sentences, used over and over.
        tokenizer: counts.

    """

    def __init__(self, pool: Sequence[str], tokenizer: Tokenizer) -> None:
        self._pool = pool
        sample = " ".join(islice(cycle(pool), SAMPLE))
        self._characters = len(sample) / max(1, tokenizer.count([sample])[0])

    def sentences(self, tokens: int, pool: Sequence[str] | None = None) -> list[str]:
        """Whole sentences of at most about ``tokens`` tokens.

        Args:
            tokens: how long.
            pool: other sentences of the same kind, or the same in another order.

        """
        return _take(pool or self._pool, tokens * self._characters)

    def words(self, tokens: int, pool: Sequence[str] | None = None) -> list[str]:
        """As ``sentences``, with the beginning of one more, up to a word."""
        pool = pool or self._pool
        room = tokens * self._characters
        whole = _take(pool, room)
        room -= sum(len(s) + 1 for s in whole)
        following = pool[len(whole) % len(pool)]
        end = following[: max(0, int(room))].rfind(" ")
        return [*whole, following[:end]] if end > 0 else whole


def _take(pool: Sequence[str], characters: float) -> list[str]:
    chosen: list[str] = []
    for sentence in cycle(pool):
        characters -= len(sentence) + 1
        if characters < 0:
            break
        chosen.append(sentence)
    return chosen
