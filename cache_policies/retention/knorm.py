"""Knorm: keys of small norm.

Source: Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache
Compression", arXiv 2406.11430. A weak baseline that costs almost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cache_policies.retention.base import BOUNDED, FULL, Budgeted

if TYPE_CHECKING:
    import torch

    from cache_policies.retention.seen import Seen


@dataclass(frozen=True)
class Knorm(Budgeted):
    """Keys with the smallest L2 norm."""

    name: ClassVar[str] = "knorm"
    keeps: ClassVar[str] = "tokens whose keys have a small norm"
    loses: ClassVar[str] = "tokens whose keys have a large norm"
    PREFILL: ClassVar[tuple[str, ...]] = (FULL, BOUNDED)
    DECODE_CUTS: ClassVar[bool] = True

    def score(self, seen: Seen) -> torch.Tensor:
        return -seen.keys.norm(dim=-1)
