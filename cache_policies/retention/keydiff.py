"""KeyDiff: keys unlike the others.

Source: Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM
Inference in Resource-Constrained Environments", arXiv 2504.15364. No attention is needed, so
the budget can hold during prefill.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch.nn import functional

from cache_policies.retention.base import BOUNDED, FULL, Budgeted

if TYPE_CHECKING:
    import torch

    from cache_policies.retention.seen import Seen


@dataclass(frozen=True)
class KeyDiff(Budgeted):
    """Keys least similar (cosine) to the mean of the normalized keys."""

    name: ClassVar[str] = "keydiff"
    keeps: ClassVar[str] = "tokens whose keys differ from the average key"
    loses: ClassVar[str] = "tokens whose keys are like many others"
    PREFILL: ClassVar[tuple[str, ...]] = (BOUNDED, FULL)
    DECODE_CUTS: ClassVar[bool] = True

    def score(self, seen: Seen) -> torch.Tensor:
        keys = functional.normalize(seen.keys, dim=-1)
        anchor = functional.normalize(keys.mean(1, keepdim=True), dim=-1)
        return -(keys * anchor).sum(-1)
