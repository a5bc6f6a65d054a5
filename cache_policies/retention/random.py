"""Random eviction: the control every other method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from cache_policies.retention.base import BOUNDED, FULL, Budgeted

if TYPE_CHECKING:
    from cache_policies.retention.seen import Seen


@dataclass(frozen=True)
class Random(Budgeted):
    """Keeps sinks and window, and of the rest a random choice per KV head.

    The choice depends on ``seed``, the layer and the number of tokens, so it can be repeated.
    """

    name: ClassVar[str] = "random"
    keeps: ClassVar[str] = "sinks, the recent window, a random choice of the rest"
    loses: ClassVar[str] = "everything else; a control, not for use"
    PREFILL: ClassVar[tuple[str, ...]] = (FULL, BOUNDED)
    DECODE_CUTS: ClassVar[bool] = True

    seed: int = 0

    def score(self, seen: Seen) -> torch.Tensor:
        chance = torch.Generator().manual_seed((self.seed * 997 + seen.layer) * 2**20 + seen.end)
        score = torch.rand(seen.position.shape, generator=chance, dtype=torch.float32)
        return score.to(seen.position.device, non_blocking=True)
