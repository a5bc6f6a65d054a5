"""Texts of a wanted number of tokens: the built-in ones, or the files of a folder."""

from __future__ import annotations

import random
import re
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from loadtest.errors import LoadTestError
from loadtest.workloads.haystack import ESSAY, NOISE

if TYPE_CHECKING:
    from loadtest.workloads.tokens import Tokenizer

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
        for part in _SENTENCE.split(file.read_text(encoding="utf-8", errors="replace"))
        if part.strip()
    ]
    if not found:
        raise LoadTestError(f"folder {source} holds no .txt file with text")
    return found


def fill(pool: list[str], tokens: int, tokenizer: Tokenizer) -> list[str]:
    """Sentences of the pool, over and over, until there are ``tokens`` tokens."""
    chosen: list[str] = []
    total = 0
    for sentence in cycle(pool):
        if total >= tokens:
            break
        chosen.append(sentence)
        total += tokenizer.count([f" {sentence}"])[0]
    return chosen


def fill_exactly(pool: list[str], tokens: int, tokenizer: Tokenizer) -> list[str]:
    """As ``fill``, with the last sentence cut short so that ``tokens`` is met within a word."""
    chosen = fill(pool, tokens, tokenizer)
    if not chosen:
        return chosen
    last = chosen.pop()
    counts = tokenizer.count([f" {s}" for s in (*chosen, last)])
    words = last.split()
    share = (tokens - sum(counts[:-1])) / max(1, counts[-1])
    return [*chosen, " ".join(words[: max(1, round(share * len(words)))])]
