"""What compressors share: words, their scores, and the cut at a rate."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Sequence

# Scripts without spaces between words: every character is one.
_NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef"
_WORD = re.compile(rf"\s*(?:[{_NO_SPACES}]|[^\s{_NO_SPACES}]+)")
FORCED = re.compile(r"^[\n.?!,]+$")
_DIGIT = re.compile(r"\d")


class CompressorError(ValueError):
    """A compression that cannot be done; the message says why."""


@dataclass(frozen=True)
class Word:
    """A word with the white space before it.

    Attributes:
        start, end: place in the text, white space included.
        text: the characters.

    """

    start: int
    end: int
    text: str


def split_words(text: str, most: int | None = None) -> list[Word]:
    """Words of a text; joined they are the text, but for white space at its end.

    Raises:
        CompressorError: there are more than ``most``.

    """
    found = [Word(m.start(), m.end(), m[0]) for m in islice(_WORD.finditer(text), most)]
    if most is not None and len(found) == most and text[found[-1].end :].strip():
        raise CompressorError(f"the text has more than {most} words")
    return found


def keep_words(
    words: Sequence[Word],
    scores: Sequence[float],
    tokens: Sequence[int],
    rate: float,
    *,
    keep_digits: bool = True,
) -> str:
    """The best words whose tokens are ``rate`` of all, in their order.

    Args:
        words: of a text.
        scores: of each; higher stays.
        tokens: of each in the served model, so that the rate is reached in its tokens.
        rate: share of the tokens to keep, 0 to 1.
        keep_digits: words with a digit always stay (LLMLingua-2's ``force_reserve_digit``).

    Returns:
        The shortened text. Words that always stay count toward the rate, and may exceed it; a line
        break before a dropped word stays too, kept words keep their white space.

    """
    forced = [bool(FORCED.match(w.text.strip())) or (keep_digits and _has_digit(w)) for w in words]
    left = rate * sum(tokens) - sum(t for t, f in zip(tokens, forced, strict=True) if f)
    kept = set()
    for index in sorted(range(len(words)), key=lambda i: -scores[i]):
        if forced[index]:
            continue
        if tokens[index] <= left:
            left -= tokens[index]
            kept.add(index)
    parts: list[str] = []
    line_break = False  # before a dropped word, and still to come
    for index, word in enumerate(words):
        broken = "\n" in word.text
        if forced[index] or index in kept:
            own = broken or not line_break or not parts
            parts.append(word.text if own else "\n" + word.text.lstrip())
            line_break = False
        else:
            line_break = line_break or broken
    return "".join(parts).lstrip(" ")


def _has_digit(word: Word) -> bool:
    return bool(_DIGIT.search(word.text))


class Compressor(ABC):
    """Scores the words of a text.

    Attributes:
        name: of the method.
        most_letters: of a text; a longer one is refused before anything is made of it.
        most_words: the same in words.

    """

    name: ClassVar[str]
    most_letters: int
    most_words: int

    @abstractmethod
    async def scores(self, text: str, words: Sequence[Word]) -> list[float]:
        """A score per word; higher is kept first.

        Raises:
            CompressorError: this text cannot be scored.

        """


def mean_by_word(
    words: Sequence[Word], spans: Sequence[tuple[int, int]], values: Sequence[float]
) -> list[float]:
    """Mean of the values of each word's tokens; 0 for a word without any.

    Args:
        words: of a text, in order.
        spans: start and end of each token in the text, in order; empty ones are special tokens.
        values: of each token.

    """
    sums = [0.0] * len(words)
    counts = [0] * len(words)
    index = 0
    for (start, end), value in zip(spans, values, strict=True):
        if end <= start:
            continue
        # a token belongs to the word in which it ends: it may begin with the white space before
        while index < len(words) and words[index].end < end:
            index += 1
        if index == len(words):
            break
        sums[index] += value
        counts[index] += 1
    return [s / c if c else 0.0 for s, c in zip(sums, counts, strict=True)]


def tokens_by_word(words: Sequence[Word], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Number of each word's tokens; arguments as for ``mean_by_word``."""
    ends = sorted(end for start, end in spans if end > start)
    counts, at = [], 0
    for word in words:
        begin = at
        while at < len(ends) and ends[at] <= word.end:
            at += 1
        counts.append(at - begin)
    return counts
