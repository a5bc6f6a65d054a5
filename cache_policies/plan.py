"""What vLLM's scheduler and its workers must agree on, as pure functions of token counts.

The block manager (scheduler process) and the attention backend (worker processes) never
talk about pages. Both evaluate this module on the number of computed tokens, and so agree
on how many pages a request owns and where each token lies. No vLLM import here.

Block-table row of a request: ``[ring page 0 .. R-1][store page 0 .. S-1]``.

Every function accepts plain ints and integer arrays alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from cache_policies.page import PageLayout

    Count = TypeVar("Count", int, npt.NDArray[np.int32])
else:
    Count = TypeVar("Count")


@dataclass(frozen=True)
class Plan:
    """Token and page arithmetic of one policy.

    Attributes:
        page_tokens: tokens of a store page.
        quantum: tokens absorbed from ring to store at once; 1 means there is no ring.
            It divides ``page_tokens``, so a full store page depends only on its own tokens
            and prefix caching keeps working.
        ring_pages: pages at the head of the row.

    """

    page_tokens: int
    quantum: int
    ring_pages: int

    @classmethod
    def of(cls, layout: PageLayout) -> Plan:
        """The plan of a page layout."""
        return cls(layout.page_tokens, max(1, layout.codec.residual), layout.ring_pages)

    def stored(self, computed: Count) -> Count:
        """Tokens in the store once ``computed`` tokens have been computed."""
        return computed // self.quantum * self.quantum

    def in_ring(self, computed: Count) -> Count:
        """Tokens in the ring once ``computed`` tokens have been computed."""
        return computed - self.stored(computed)

    def store_pages(self, computed: Count) -> Count:
        """Store pages that hold at least one token."""
        return -(-self.stored(computed) // self.page_tokens)

    def pages(self, computed: Count) -> Count:
        """Length of the row: ring and store pages of a request."""
        return self.ring_pages + self.store_pages(computed)

    def full_pages(self, computed: Count) -> Count:
        """Store pages that are complete, hence may be published to the prefix cache."""
        return self.stored(computed) // self.page_tokens

    def store_slot(self, token: int) -> tuple[int, int]:
        """Row index and position inside the page of a stored token."""
        return self.ring_pages + token // self.page_tokens, token % self.page_tokens
