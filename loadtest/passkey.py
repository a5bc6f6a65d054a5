"""Passkey prompts: a key hidden in a long text, and a question for it.

Instruction, needle and question are those of LongCTX-Bench (arXiv 2407.01527); see
``haystack`` for the texts. Everything follows from the seed.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import cycle, product
from typing import TYPE_CHECKING

from loadtest.haystack import TEXTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

INSTRUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there."
)
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"


@dataclass(frozen=True)
class Case:
    """One prompt and its truth.

    Attributes:
        text: ``noise`` or ``essay``.
        tokens: tokens of haystack asked for.
        depth: where the needle sits, 0 (start) to 1 (end).
        key: the digits to find.
        prompt: the whole prompt.

    """

    text: str
    tokens: int
    depth: float
    key: str
    prompt: str

    @property
    def max_tokens(self) -> int:
        """Room for the key when every digit is a token, and a little more."""
        return len(self.key) + 8


def cases(
    count_tokens: Callable[[list[str]], list[int]],
    *,
    grid: Iterable[tuple[int, float]],
    digits: Iterable[int] = (7, 64),
    texts: Iterable[str] = ("noise", "essay"),
    seed: int = 0,
) -> Iterator[Case]:
    """Cases for every text x digits x (tokens, depth).

    Args:
        count_tokens: tokens of each of several strings, in the served model's tokens.
        grid: pairs of haystack tokens and needle depth.
        digits: lengths of the key.
        texts: names in ``haystack.TEXTS``.
        seed: fixes keys and the order of sentences.

    """
    rng = random.Random(seed)
    for text, (tokens, depth), length in product(texts, grid, digits):
        sentences = _fill(TEXTS[text], tokens, count_tokens, random.Random(f"{seed}-{text}"))
        key = "".join(rng.choice("0123456789") for _ in range(length))
        position = round(depth * len(sentences))
        hay = [*sentences[:position], NEEDLE.format(key=key), *sentences[position:]]
        prompt = "\n".join((INSTRUCTION, " ".join(hay), QUESTION))
        yield Case(text, tokens, depth, key, prompt)


def _fill(
    pool: tuple[str, ...],
    tokens: int,
    count_tokens: Callable[[list[str]], list[int]],
    rng: random.Random,
) -> list[str]:
    """Sentences of the pool, in a fixed random order, until ``tokens`` tokens are reached."""
    counts = count_tokens([f" {sentence}" for sentence in pool])
    order = list(range(len(pool)))
    if len(pool) > 8:  # noise is a fixed cycle; essays are shuffled
        rng.shuffle(order)
    chosen: list[str] = []
    total = 0
    for index in cycle(order):
        if total >= tokens:
            return chosen
        chosen.append(pool[index])
        total += counts[index]
    raise AssertionError("a cycle does not end")
