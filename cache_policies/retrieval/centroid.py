"""Pages by the product of the query with their mean key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cache_policies.retrieval.base import Retrieval

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Centroid(Retrieval):
    """One mean key a page: the simplest summary there is."""

    name: ClassVar[str] = "centroid"
    keeps: ClassVar[str] = "every token; a query reads the pages whose mean key it likes"
    loses: ClassVar[str] = "single keys that stand out in a page"

    def summarize(self, keys: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
        return keys.mean(2, keepdim=True)

    def score(self, query: torch.Tensor, summary: torch.Tensor) -> torch.Tensor:
        return (summary[:, :, 0] @ query.mean(1)[..., None])[..., 0]
