"""Scores of the answers: by task, by category, by length and depth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel

from loadtest.measuring.estimates import Estimate, mean

if TYPE_CHECKING:
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
    """Scores of the answers; ``overall`` is the plain mean of the tasks."""

    overall: float
    overall_interval: tuple[float, float] | None
    partial_key: Estimate | None
    tasks: list[Score]
    categories: dict[str, float]
    heat: list[HeatCell]


def quality(good: list[Record]) -> Quality | None:
    """Quality of the answers that were scored; None if none was."""
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
    return Quality(
        overall=float(np.mean([t.score.value for t in counted])),
        overall_interval=_interval([by_task[t.category, t.name] for t in counted]),
        partial_key=mean([r.partial for r in good if r.partial is not None]),
        tasks=tasks,
        categories=categories,
        heat=_heat(good),
    )


def _interval(tasks: list[list[float]], resamples: int = 500) -> tuple[float, float] | None:
    """95 % interval of the mean of task means, rows resampled within their task."""
    if max(len(t) for t in tasks) < 2:
        return None
    rng = np.random.default_rng(0)
    arrays = [np.asarray(t) for t in tasks]
    drawn = [
        np.mean([a[rng.integers(len(a), size=len(a))].mean() for a in arrays])
        for _ in range(resamples)
    ]
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(low), float(high)


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
