"""Scores of one answer against its references, 0 to 1.

Post-processing and definitions are LongBench's (arXiv 2308.14508), with words of any script; edit
similarity and the longest common subsequence are rapidfuzz's. The score of several references is
the best of them.
"""

from __future__ import annotations

import re
from collections import Counter
from difflib import SequenceMatcher
from typing import TYPE_CHECKING

from rapidfuzz import fuzz
from rapidfuzz.distance import LCSseq

from loadtest.quality.words import answer_words, words

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_NUMBER = re.compile(r"\d+")
_LINE_END = re.compile(r"\r\n?|\n")


def _lines(text: str) -> list[str]:
    """Lines that are not blank: models often begin with some that are."""
    return [line for line in _LINE_END.split(text) if line.strip()]


def first_line(answer: str) -> str:
    """The first line that is not blank: what LongBench scores of few-shot answers."""
    return next(iter(_lines(answer)), "")


def first_code_line(answer: str) -> str:
    """The first line that is not blank and has no backtick, ``#`` or ``//`` (LongBench's)."""
    found = (x for x in _lines(answer) if "`" not in x and "#" not in x and "//" not in x)
    return next(found, "")


def best(
    score: Callable[[str, str], float], clean: Callable[[str], str] = str
) -> Callable[[str, Sequence[str], Sequence[str]], float]:
    """A metric: the best score of the cleaned answer over all references."""

    def metric(answer: str, references: Sequence[str], _: Sequence[str]) -> float:
        cleaned = clean(answer)
        return max((score(cleaned, reference) for reference in references), default=0.0)

    return metric


def f1(answer: str, reference: str) -> float:
    """F1 of the words both have, without case, punctuation and articles (SQuAD's)."""
    ours, right = Counter(answer_words(answer)), Counter(answer_words(reference))
    shared = (ours & right).total()
    return 2 * shared / (ours.total() + right.total()) if shared else 0.0


def rouge_l(answer: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words (Lin 2004, as in rouge-score)."""
    ours, right = words(answer), words(reference)
    shared = LCSseq.similarity(ours, right)
    return 2 * shared / (len(ours) + len(right)) if shared else 0.0


def class_accuracy(answer: str, references: Sequence[str], classes: Sequence[str]) -> float:
    """1 over the number of classes the answer names, if the right one is among them.

    A class that is part of the right one's name does not count as named. The right one is a class
    even where the list lacks it.
    """

    def one(reference: str) -> float:
        known = dict.fromkeys((*classes, reference))
        named = [c for c in known if c in text and not (c in reference and c != reference)]
        return 1 / len(named) if reference in named else 0.0

    text = first_line(answer)
    return max((one(reference) for reference in references), default=0.0)


def count(answer: str, reference: str) -> float:
    """Share of the answer's numbers that are the reference."""
    numbers = _NUMBER.findall(answer)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def retrieval(answer: str, reference: str) -> float:
    """``count`` of the paragraph number in a reference like ``Paragraph 19``."""
    match = _NUMBER.search(reference)
    return count(answer, match[0]) if match else 0.0


def edit_similarity(answer: str, reference: str) -> float:
    """1 less the insertions and deletions needed, over the length of both."""
    return fuzz.ratio(answer, reference) / 100


def exact_key(answer: str, key: str) -> float:
    """1 if the key stands in the answer."""
    return float(bool(key) and key in answer)


def partial_key(answer: str, key: str) -> float:
    """Longest common substring over the key's length."""
    if not key:
        return 0.0
    matcher = SequenceMatcher(None, answer, key, autojunk=False)
    return matcher.find_longest_match().size / len(key)


def all_strings(answer: str, references: Sequence[str], _: Sequence[str]) -> float:
    """Share of the references that stand in the answer, without case (RULER's)."""
    lower = answer.lower()
    return sum(r.lower() in lower for r in references) / len(references) if references else 0.0


METRICS: dict[str, Callable[[str, Sequence[str], Sequence[str]], float]] = {
    "f1": best(f1),
    "f1_first_line": best(f1, first_line),
    "rouge_l": best(rouge_l),
    "rouge_l_first_line": best(rouge_l, first_line),
    "class_accuracy_first_line": class_accuracy,
    "retrieval": best(retrieval),
    "count": best(count),
    "edit_similarity": best(edit_similarity, first_code_line),
    "exact_key": best(exact_key),
    "partial_key": best(partial_key),
    "all_strings": all_strings,
}
