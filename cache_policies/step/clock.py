"""Seconds a worker spends in the parts of its work on the cache."""

from __future__ import annotations

import time

PARTS = ("attend", "append", "cut")  # counting scores is in attend, absorbing in append


class Clock:
    """Adds up laps by part."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._last = 0.0
        self._layer = -1

    def begins_step(self, layer: int) -> bool:
        """Whether this layer's number does not follow the last one's: another step has begun."""
        begins = layer <= self._layer
        self._layer = layer
        return begins

    def start(self) -> None:
        """Begin a lap."""
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Add the time since the last lap to a part."""
        now = time.perf_counter()
        self._seconds[part] += now - self._last
        self._last = now

    def take(self) -> dict[str, float]:
        """Seconds since they were last taken."""
        taken, self._seconds = self._seconds, dict.fromkeys(PARTS, 0.0)
        return taken
