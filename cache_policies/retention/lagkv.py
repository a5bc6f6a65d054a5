"""LagKV: tokens that stand out from the statistics of the chunk after theirs.

Source: Liang et al., "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are
Important", arXiv 2504.04704. Keys and values are scaled by the minimum and maximum per channel
of the next ``lag`` tokens; the score is the deviation over the channels, ranked inside each
chunk so that every chunk keeps the same share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from cache_policies.errors import PolicyError
from cache_policies.retention.base import Budgeted

if TYPE_CHECKING:
    from cache_policies.parameters import Value
    from cache_policies.retention.seen import Seen


@dataclass(frozen=True)
class LagKV(Budgeted):
    """Tokens unlike the next chunk; the last chunk, which has none, is kept.

    Attributes:
        lag: tokens of a chunk.

    """

    name: ClassVar[str] = "lagkv"
    keeps: ClassVar[str] = "tokens that stand out from the chunk after theirs"
    loses: ClassVar[str] = "tokens that look like what follows them"

    lag: int = 128

    @classmethod
    def settable(cls) -> dict[str, Value]:
        # the last chunk is its window
        return {key: value for key, value in super().settable().items() if key != "window"}

    def check(self) -> None:
        if self.lag < 2 or self.sinks < 0:
            raise PolicyError(f"lag={self.lag} is below 2 or sinks={self.sinks} below 0")
        if not self.ratio and self.budget <= self.protected_tokens:
            raise PolicyError(
                f"budget={self.budget} is not above sinks + 2 lag = {self.protected_tokens}"
            )

    @property
    def protected_tokens(self) -> int:
        return self.sinks + 2 * self.lag

    def _chunks(self, end: int) -> int:
        return max(0, (end - self.sinks) // self.lag - 1)

    def protected(self, seen: Seen) -> torch.Tensor:
        tail = self.sinks + self._chunks(seen.prompt_end) * self.lag
        return (seen.position < self.sinks) | (seen.position >= tail)

    def score(self, seen: Seen) -> torch.Tensor:
        chunks = self._chunks(seen.prompt_end)
        score = torch.zeros_like(seen.mass)
        if chunks:
            span = slice(self.sinks, self.sinks + (chunks + 1) * self.lag)
            both = sum(self._deviation(x[:, span]) for x in (seen.keys, seen.values))
            rank = both.argsort(-1).argsort(-1).float()  # type: ignore[union-attr]
            score[:, self.sinks : span.stop - self.lag] = rank.flatten(1)
        return score

    def _deviation(self, x: torch.Tensor) -> torch.Tensor:
        """``[heads, (chunks + 1) lag, channels]`` -> ``[heads, chunks, lag]``."""
        chunks = x.unflatten(1, (-1, self.lag))
        low = chunks[:, 1:].amin(2, keepdim=True)
        high = chunks[:, 1:].amax(2, keepdim=True)
        scaled = (chunks[:, :-1] - low) / (high - low).clamp_min(1e-9)
        return scaled.std(-1).softmax(-1)
