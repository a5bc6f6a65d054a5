"""Service goals, the share of requests that meet them, and the highest rate that still does."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loadtest.errors import LoadTestError

if TYPE_CHECKING:
    from collections.abc import Callable

    from loadtest.sending.records import Record

_GOAL = re.compile(r"\s*(ttft|tpot|e2e)\s*:\s*(\d+(?:\.\d+)?)\s*(ms|s)\s*")


@dataclass(frozen=True)
class Goals:
    """Most seconds each part of a request may take; TTFT and E2E count from when it was due."""

    limits: dict[str, float]

    @classmethod
    def parse(cls, text: str) -> Goals:
        """Read ``ttft:2s,tpot:80ms``.

        Raises:
            LoadTestError: not such a text.

        """
        limits: dict[str, float] = {}
        for part in text.split(","):
            match = _GOAL.fullmatch(part)
            if not match or match[1] in limits:
                raise LoadTestError(
                    f"--goodput {text!r}: write ttft, tpot or e2e with s or ms, e.g. "
                    "ttft:2s,tpot:80ms"
                )
            limits[match[1]] = float(match[2]) / (1000 if match[3] == "ms" else 1)
        return cls(limits)

    def met(self, record: Record) -> bool | None:
        """Whether a request met every goal; a failed one did not. None: it cannot be told.

        An answer of one token has no time per further token, and meets every goal for it.
        """
        if record.status != "ok":
            return False
        single = record.output_tokens == 1
        took = {
            "ttft": record.scheduled_ttft,
            "tpot": 0.0 if single else record.tpot,
            "e2e": record.scheduled_e2e,
        }
        known = [took[name] for name in self.limits]
        limits = self.limits.values()
        if any(t is not None and t > limit for t, limit in zip(known, limits, strict=True)):
            return False
        return None if None in known else True


def highest_rate(
    attainment: Callable[[float], float],
    low: float,
    high: float,
    wanted: float = 0.95,
    steps: int = 5,
) -> float | None:
    """Highest rate at which at least ``wanted`` of the requests meet the goals, by bisection.

    Args:
        attainment: runs at a rate, gives the share that met the goals.
        low: lowest rate to try, requests per second.
        high: highest.
        wanted: share.
        steps: runs after those at the two ends; each takes the geometric mean of what is left.

    Returns:
        The rate, ``high`` if even that is met; None if ``low`` is not.

    """
    if attainment(low) < wanted:
        return None
    if attainment(high) >= wanted:
        return high
    for _ in range(steps):
        middle = (low * high) ** 0.5
        if attainment(middle) >= wanted:
            low = middle
        else:
            high = middle
    return low
