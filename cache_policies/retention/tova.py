"""TOVA: what the last query attends to.

Source: Oren et al., "Transformers are Multi-State RNNs", arXiv 2401.06104. The attention is
averaged over all heads of a layer, which so keep the same tokens. The original drops one token
at every step; here those that overflow are dropped together, every ``interval`` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cache_policies.retention.base import BOUNDED, FULL, Budgeted

if TYPE_CHECKING:
    import torch

    from cache_policies.retention.seen import Seen


@dataclass(frozen=True)
class Tova(Budgeted):
    """Tokens with most attention from the last query, averaged over heads."""

    name: ClassVar[str] = "tova"
    keeps: ClassVar[str] = "what the last token attends to"
    loses: ClassVar[str] = "what the last token does not need, even if a later one would"
    PREFILL: ClassVar[tuple[str, ...]] = (FULL, BOUNDED)
    DECODE_CUTS: ClassVar[bool] = True
    ACCUMULATES: ClassVar[bool] = False

    sinks: int = 0
    window: int = 1

    def first_query(self, before: int, after: int, prompt: int, cuts: bool) -> int | None:
        return after - 1 if cuts else None

    def score(self, seen: Seen) -> torch.Tensor:
        # Heads hold the same tokens in the same order, for they always kept the same ones.
        return seen.mass.mean(0, keepdim=True).expand_as(seen.mass)
