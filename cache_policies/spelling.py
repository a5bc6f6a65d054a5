"""Names that are almost one of ours: what nobody else would mean must not be ignored."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

from cache_policies.errors import PolicyError

if TYPE_CHECKING:
    from collections.abc import Iterable

LIKE = 0.8  # difflib's ratio: two letters off in a name of twelve, but no other name in use
MOST = 1000  # keys of an object; each is compared while others wait


def near(name: str, ours: Iterable[str]) -> str | None:
    """The name of ours that another is a misspelling of; None: it is one of them, or like none."""
    ours, word = list(ours), name.lower()
    # what difflib's ratio is at most, by the lengths: it would read the longest name through first
    like = [o for o in ours if 2 * min(len(o), len(word)) >= LIKE * (len(o) + len(word))]
    if not like or name in ours:
        return None
    close = get_close_matches(word, like, n=1, cutoff=LIKE)
    return close[0] if close else None


def refuse_near(names: Iterable[object], ours: Iterable[str], where: str) -> None:
    """Refuse keys that would be ignored although ours were meant.

    Raises:
        PolicyError: naming the key and ours; more keys than ``MOST``.

    """
    ours, names = list(ours), list(names)
    if len(names) > MOST:
        raise PolicyError(f"{where} has {len(names)} keys, and at most {MOST} are taken")
    for name in names:
        meant = near(name, ours) if isinstance(name, str) else None
        if meant:
            raise PolicyError(f"{where} has no key {name!r}; did you mean {meant!r}?")
