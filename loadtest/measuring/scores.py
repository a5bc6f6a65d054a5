"""Scores of the answers: by task, by category, by length and depth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel

from loadtest.measuring.estimates import Estimate, mean, mean_of

if TYPE_CHECKING:
    from collections.abc import Collection

    from loadtest.sending.records import Record

UNAVERAGED = "not averaged"


class Score(BaseModel):
    """Mean score of a task or category, 0 to 1."""

    name: str
    category: str
    requests: int
    score: Estimate


class HeatCell(BaseModel):
    """Mean exact-key score of one length and depth."""

    length: float
    depth: float
    score: float
    requests: int


class Quality(BaseModel):
    """Scores of the answers.

    Attributes:
        overall: plain mean of the tasks; None where one of them has no answer, for a mean of others
            is none of theirs.
        overall_interval: 95 %.
        unanswered: tasks without an answer.

    """

    overall: float | None
    overall_interval: tuple[float, float] | None
    partial_key: Estimate | None
    tasks: list[Score]
    categories: dict[str, float]
    heat: list[HeatCell]
    unanswered: list[str] = []


def quality(good: list[Record], wanted: Collection[tuple[str, str]] = ()) -> Quality | None:
    """Quality of the answers that were scored; None if none was.

    Args:
        good: requests that were answered.
        wanted: category and name of all tasks that are scored.

    """
    by_task: dict[tuple[str, str], list[float]] = {}
    for r in good:
        if r.score is not None:
            by_task.setdefault((r.category, r.task), []).append(r.score)
    if not by_task:
        return None
    tasks = []
    for (category, task), scores in sorted(by_task.items()):
        found = mean(scores)
        assert found is not None
        tasks.append(Score(name=task, category=category, requests=len(scores), score=found))
    counted = [t for t in tasks if UNAVERAGED not in t.category] or tasks
    categories = {
        name: float(np.mean([t.score.value for t in tasks if t.category == name]))
        for name in dict.fromkeys(t.category for t in tasks)
    }
    lacking = sorted(task for category, task in {*wanted} - by_task.keys())
    whole = not any(UNAVERAGED not in category for category, _ in {*wanted} - by_task.keys())
    several = max(t.requests for t in counted) > 1
    bounds = mean_of([t.score for t in counted], [t.requests for t in counted])
    return Quality(
        overall=float(np.mean([t.score.value for t in counted])) if whole else None,
        overall_interval=bounds if whole and several else None,
        partial_key=mean([r.partial for r in good if r.partial is not None]),
        tasks=tasks,
        categories=categories,
        heat=_heat(good),
        unanswered=lacking,
    )


def _heat(good: list[Record]) -> list[HeatCell]:
    cells: dict[tuple[float, float], list[float]] = {}
    for r in good:
        if r.score is not None and {"length", "depth"} <= r.tags.keys():
            place = (float(r.tags["length"]), float(r.tags["depth"]))
            cells.setdefault(place, []).append(r.score)
    return [
        HeatCell(length=length, depth=depth, score=float(np.mean(s)), requests=len(s))
        for (length, depth), s in sorted(cells.items())
    ]
