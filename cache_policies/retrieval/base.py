"""The contract of a retrieval method: which store pages a query reads. Nothing is dropped.

Sinks and the local window are always read, the fresh tokens and the ring too; of the pages
between them the best ``topk`` by a summary of each page. All are in one softmax.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from cache_policies.errors import PolicyError
from cache_policies.parameters import Value, parameters, shown
from cache_policies.retention.base import BOUNDED, FULL


@dataclass(frozen=True)
class Retrieval(ABC):
    """Which pages a query reads. Subclasses are frozen data classes of parameters.

    Attributes:
        topk: pages read between sinks and local window.
        init: first tokens, always read; whole pages of them.
        local: last tokens, always read; whole pages of them.
        prefill: ``full``: the prompt's queries read everything; ``bounded``: they read as
            decode queries do, one choice for a chunk.

    """

    name: ClassVar[str]
    keeps: ClassVar[str]
    loses: ClassVar[str]
    NEEDS_EVERY_QUERY: ClassVar[bool] = False
    OBSERVES: ClassVar[int] = 0  # tokens over whose queries attention to a page is counted
    PREFILL: ClassVar[tuple[str, ...]] = (FULL, BOUNDED)

    topk: int = 16
    init: int = 128
    local: int = 4096
    prefill: str = FULL

    @classmethod
    def settable(cls) -> dict[str, Value]:
        """Parameters a user may set, with their defaults."""
        return parameters(cls)

    def __post_init__(self) -> None:
        if self.topk < 1:
            raise PolicyError(f"topk={self.topk} is below 1")
        if self.init < 0 or self.local < 1:
            raise PolicyError(f"init={self.init} is below 0 or local={self.local} below 1")
        if self.prefill not in self.PREFILL:
            raise PolicyError(f"prefill={self.prefill} is not one of {', '.join(self.PREFILL)}")

    def __str__(self) -> str:
        return shown(self.name, self, self.settable())

    @property
    def bounded(self) -> bool:
        """Whether the prompt's queries read a part only."""
        return self.prefill == BOUNDED

    def middle(self, held: int, page_tokens: int) -> range:
        """Store pages that are neither sinks nor in the local window of ``held`` tokens."""
        first = -(-self.init // page_tokens)
        return range(first, max(first, (held - self.local) // page_tokens))

    @abstractmethod
    def summarize(self, keys: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
        """What is remembered of pages.

        Args:
            keys: ``[num_kv_heads, pages, page_tokens, head_size]`` float32.
            mass: ``[num_kv_heads, pages, page_tokens]``, attention counted over the queries
                of the next ``OBSERVES`` tokens; zeros where that is 0.

        Returns:
            ``[num_kv_heads, pages, k, head_size]`` with k of the method's choice.

        """

    @abstractmethod
    def score(self, query: torch.Tensor, summary: torch.Tensor) -> torch.Tensor:
        """How much a query wants each page.

        Args:
            query: ``[num_kv_heads, group, head_size]`` float32, the query heads of a KV head.
            summary: as ``summarize`` returned it.

        Returns:
            ``[num_kv_heads, pages]``.

        """

    def choose(
        self, query: torch.Tensor, summary: torch.Tensor, middle: range, pages: int
    ) -> torch.Tensor:
        """Pages to read, ``[num_kv_heads, k]`` int32 ascending.

        Args:
            query: ``[num_kv_heads, group, head_size]``.
            summary: of the pages in ``middle``.
            middle: as ``self.middle`` returned it.
            pages: store pages of the request.

        """
        best = self.score(query, summary).topk(min(self.topk, len(middle)), dim=1).indices
        chosen = best.sort(dim=1).values.int() + middle.start
        others = torch.arange(pages, dtype=torch.int32, device=chosen.device)
        others = others.expand(chosen.shape[0], -1)
        return torch.cat([others[:, : middle.start], chosen, others[:, middle.stop :]], 1)
