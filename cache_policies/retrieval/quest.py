"""Quest: pages whose key bounds allow the largest score.

Source: Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
arXiv 2406.10774. Per page and channel the smallest and largest key bound the product with a
query from above. One choice per KV head, by the sum over its query heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from cache_policies.retention.base import FULL
from cache_policies.retrieval.base import Retrieval


@dataclass(frozen=True)
class Quest(Retrieval):
    """Sinks, a short window and the pages with the largest upper bound."""

    name: ClassVar[str] = "quest"
    keeps: ClassVar[str] = "every token; a query reads the pages with the highest bound"
    loses: ClassVar[str] = "nothing from memory; what the chosen pages lack is not seen"
    PREFILL: ClassVar[tuple[str, ...]] = (FULL,)

    local: int = 128

    def summarize(self, keys: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
        return torch.stack([keys.amin(2), keys.amax(2)], 2)

    def score(self, query: torch.Tensor, summary: torch.Tensor) -> torch.Tensor:
        low, high = query.clamp(max=0), query.clamp(min=0)
        bound = low @ summary[:, :, 0].transpose(1, 2) + high @ summary[:, :, 1].transpose(1, 2)
        return bound.sum(1)
