"""When requests are sent: one schedule, drawn once from one seed."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from loadtest.errors import LoadTestError
from loadtest.spec import Spec, parse_spec

if TYPE_CHECKING:
    from collections.abc import Sequence

Times = list[float]


class Arrivals(Spec, ABC):
    """How requests arrive."""

    spell_defaults: ClassVar[bool] = True

    @abstractmethod
    def times(self, stamps: Sequence[float | None], rng: np.random.Generator) -> Times | None:
        """Seconds after the start at which each request is due; None: when one before ends.

        Args:
            stamps: the workload's own time stamps in seconds, one a request.
            rng: drawn from, once for the whole schedule.

        """


class Closed(Arrivals):
    """A fixed number of clients, each sending its next request when its last one ended."""

    kind: ClassVar[str] = "closed"
    concurrency: int = Field(default=4, ge=1)

    def times(self, stamps: Sequence[float | None], rng: np.random.Generator) -> None:
        return None


class Constant(Arrivals):
    """One request every ``1/rate`` seconds."""

    kind: ClassVar[str] = "constant"
    rate: float = Field(default=1.0, gt=0)

    def times(self, stamps: Sequence[float | None], rng: np.random.Generator) -> Times:
        return [i / self.rate for i in range(len(stamps))]


class Gamma(Arrivals):
    """Gaps from a gamma distribution of mean ``1/rate`` and shape ``burstiness``.

    Below 1 arrivals come in bursts, 1 is Poisson, above 1 they even out (vLLM's definition).
    """

    kind: ClassVar[str] = "gamma"
    rate: float = Field(default=1.0, gt=0)
    burstiness: float = Field(default=1.0, gt=0)

    def times(self, stamps: Sequence[float | None], rng: np.random.Generator) -> Times:
        scale = 1 / (self.rate * self.burstiness)
        gaps = rng.gamma(self.burstiness, scale, len(stamps))
        return [float(t) for t in np.cumsum(gaps)]


class Poisson(Arrivals):
    """Independent arrivals: exponential gaps of mean ``1/rate``."""

    kind: ClassVar[str] = "poisson"
    rate: float = Field(default=1.0, gt=0)

    def times(self, stamps: Sequence[float | None], rng: np.random.Generator) -> Times:
        return [float(t) for t in np.cumsum(rng.exponential(1 / self.rate, len(stamps)))]


class Ramp(Arrivals):
    """Poisson arrivals whose rate goes from ``start`` to ``end`` in ``seconds``, then stays."""

    kind: ClassVar[str] = "ramp"
    start: float = Field(default=0.1, gt=0)
    end: float = Field(default=1.0, gt=0)
    seconds: float = Field(default=60.0, gt=0)

    def times(self, stamps: Sequence[float | None], rng: np.random.Generator) -> Times:
        expected = np.cumsum(rng.exponential(1.0, len(stamps)))
        return [self._when(float(e)) for e in expected]

    def _when(self, expected: float) -> float:
        """Time by which ``expected`` arrivals are expected: the integral of the rate, inverted."""
        slope = (self.end - self.start) / self.seconds
        whole = (self.start + self.end) / 2 * self.seconds
        if expected > whole:
            return self.seconds + (expected - whole) / self.end
        root = float(np.sqrt(self.start**2 + 2 * slope * expected))
        # (root - start) / slope, in the form that also holds for slope 0
        return 2 * expected / (self.start + root)


class TraceTimes(Arrivals):
    """The workload's own time stamps, ``speed`` times as fast."""

    kind: ClassVar[str] = "trace"
    speed: float = Field(default=1.0, gt=0)

    def times(self, stamps: Sequence[float | None], rng: np.random.Generator) -> Times:
        known = [s for s in stamps if s is not None]
        if len(known) != len(stamps):
            raise LoadTestError("arrivals trace: this workload has no time stamps")
        first = min(known, default=0.0)
        return [(s - first) / self.speed for s in known]


ARRIVALS: dict[str, type[Arrivals]] = {
    cls.kind: cls for cls in (Closed, Constant, Poisson, Gamma, Ramp, TraceTimes)
}


def parse_arrivals(text: str) -> Arrivals:
    """Read e.g. ``poisson(rate=2)``.

    Raises:
        LoadTestError: says what is allowed.

    """
    return parse_spec(text, ARRIVALS, "arrivals")


@dataclass(frozen=True)
class Schedule:
    """When each request is due.

    Attributes:
        due: seconds after the start, ascending; None for a closed loop.
        concurrency: most requests under way at a time; None: no limit.

    """

    due: tuple[float, ...] | None
    concurrency: int | None

    @classmethod
    def draw(
        cls,
        arrivals: Arrivals,
        stamps: Sequence[float | None],
        seed: int,
        max_concurrency: int | None = None,
    ) -> Schedule:
        """Draw the whole schedule at once."""
        times = arrivals.times(stamps, np.random.default_rng(seed))
        if isinstance(arrivals, Closed):
            return cls(None, min(arrivals.concurrency, max_concurrency or arrivals.concurrency))
        return cls(tuple(times or ()), max_concurrency)

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits that name this schedule."""
        text = repr((self.due and tuple(round(t, 9) for t in self.due), self.concurrency))
        return hashlib.sha256(text.encode()).hexdigest()[:12]
