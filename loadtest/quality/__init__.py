"""Scoring answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from loadtest.quality.metrics import METRICS

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["METRICS", "score"]


class Asked(Protocol):
    """What scoring needs to know of what was asked; a workload's item is one."""

    @property
    def metric(self) -> str | None: ...
    @property
    def references(self) -> Sequence[str]: ...
    @property
    def classes(self) -> Sequence[str]: ...


def score(item: Asked, answer: str) -> float | None:
    """Score of an answer, 0 to 1, by the item's metric; None if it has none."""
    if item.metric is None:
        return None
    return METRICS[item.metric](answer, item.references, item.classes)
