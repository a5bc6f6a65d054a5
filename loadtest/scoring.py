"""Scores of answers, 0 to 1."""

from __future__ import annotations

from difflib import SequenceMatcher


def exact_key(answer: str, key: str) -> float:
    """1 if the key stands in the answer."""
    return float(key in answer)


def partial_key(answer: str, key: str) -> float:
    """Longest common substring over the key's length (LongCTX-Bench's partial match)."""
    if not key:
        raise ValueError("an empty key cannot be scored")
    matcher = SequenceMatcher(None, answer, key, autojunk=False)
    return matcher.find_longest_match().size / len(key)
