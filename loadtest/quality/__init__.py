"""Scoring answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loadtest.quality.metrics import METRICS

if TYPE_CHECKING:
    from loadtest.workloads import Item

__all__ = ["METRICS", "score"]


def score(item: Item, answer: str) -> float | None:
    """Score of an answer, 0 to 1, by the item's metric; None if it has none."""
    if item.metric is None:
        return None
    return METRICS[item.metric](answer, item.references, item.classes)
