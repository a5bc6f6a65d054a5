"""What vLLM's scheduler and its workers must agree on, as pure functions of token counts.

The block manager (scheduler process) and the attention backend (worker processes) never
talk about pages. Both evaluate this module on the number of computed tokens, and so agree
on how many pages a request owns and where each token lies. No vLLM import here.

Block-table row of a request: ``[ring page 0 .. R-1][store page 0 .. S-1]``. A request whose
tokens are dropped later moves what it keeps to the end of its row, and the pages in front of
it go back to the pool::

    before   [ring][p0][p1][p2] ... [p63]
    after    [ring][--][--][--] ... [----][k0][k1] ... [k7]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from cache_policies.pages.layout import PageLayout

    Count = TypeVar("Count", int, npt.NDArray[np.int32])
else:
    Count = TypeVar("Count")


@dataclass(frozen=True)
class Plan:
    """Token and page arithmetic of a codec; held tokens are those a request still has.

    Every function accepts plain ints and integer arrays alike.

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
        return cls(layout.page_tokens, max(1, layout.residual), layout.ring_pages)

    def stored(self, held: Count) -> Count:
        """Tokens in the store when ``held`` tokens are held."""
        return held // self.quantum * self.quantum

    def in_ring(self, held: Count) -> Count:
        """Tokens in the ring when ``held`` tokens are held."""
        return held - self.stored(held)

    def store_pages(self, held: Count) -> Count:
        """Store pages that hold at least one token."""
        return -(-self.stored(held) // self.page_tokens)

    def pages(self, held: Count) -> Count:
        """Ring and store pages of a request that has dropped nothing."""
        return self.ring_pages + self.store_pages(held)

    def full_pages(self, held: Count) -> Count:
        """Store pages that are complete, hence may be published to the prefix cache."""
        return self.stored(held) // self.page_tokens


@dataclass(frozen=True)
class Span:
    """Token and page arithmetic of one request, which may drop tokens.

    A *cut* is a step after which fewer tokens are held than were computed and held before.

    Attributes:
        plan: the codec's arithmetic.
        prompt: tokens of the prompt.
        keep: tokens a cut leaves (of the layer that keeps most); None: nothing is dropped.
        least: tokens a cut leaves in the layer that keeps fewest.
        bounded: the prompt is cut chunk by chunk, so that no more than ``keep`` tokens and the
            fresh ones are ever held. False: the whole prompt is held until it is complete.
        interval: decode tokens between two cuts; 0: decode tokens are never dropped.
        private: what is kept overwrites the request's own last pages instead of new ones. Only
            where no page is published: there is no prefix cache, or no room for both.

    """

    plan: Plan
    prompt: int = 0
    keep: int | None = None
    least: int | None = None
    bounded: bool = False
    interval: int = 0
    private: bool = False

    @property
    def drops(self) -> bool:
        """Whether tokens are ever dropped; a short prompt of a method that keeps answers is not."""
        if self.keep is None:
            return False
        return self.interval > 0 or self.prompt > (self.keep if self.least is None else self.least)

    @property
    def first_cut(self) -> int | None:
        """Computed tokens at which the request first moves; None: it never moves.

        Bounded requests are cut where they are, for none of their pages is shared.
        """
        if self.keep is None or self.bounded or not self.drops:
            return None
        is_long = self.prompt > (self.keep if self.least is None else self.least)
        return self.prompt if is_long else self.keep + self.interval

    def held(self, computed: int, keep: int | None = None) -> int:
        """Tokens held once ``computed`` tokens are computed, in a layer that keeps ``keep``."""
        keep = self.keep if keep is None else keep
        if keep is None:
            return computed
        if computed < self.prompt:
            return min(computed, keep) if self.bounded else computed
        grown = computed - self.prompt + min(self.prompt, keep)
        if not self.interval or grown < keep + self.interval:
            return grown
        return keep + (grown - keep) % self.interval

    def most_held(self, computed: int) -> int:
        """Largest number of tokens held on the way to ``computed`` after the first cut."""
        held = self.held(computed)
        if self.keep is None or not self.interval:
            return held
        grown = computed - self.prompt + min(self.prompt, self.keep)
        return min(max(held, grown), self.keep + self.interval - 1)

    def moved(self, computed: int) -> bool:
        """Whether the request has moved to the end of its row."""
        cut = self.first_cut
        return cut is not None and computed >= cut

    def store_row(self, computed: int) -> int:
        """Row index of the first store page."""
        cut = self.first_cut
        if cut is None or computed < cut:
            return self.plan.ring_pages
        row = self.plan.pages(cut)
        return row - self.plan.store_pages(self.held(cut)) if self.private else row

    def pages(self, computed: int) -> int:
        """Length of the row, given-back pages included.

        It only grows. In the step of the first cut, before which nothing can be given back, it
        is the number of pages the request owns, and so what admission has to count.
        """
        cut = self.first_cut
        if cut is None or computed < cut:
            return self.plan.ring_pages + self.plan.store_pages(self._peak_held(computed))
        row = self.store_row(computed) + self.plan.store_pages(self._peak_held(computed))
        return max(self.plan.pages(cut), row)

    def most_pages(self, computed: int, step: int = 1) -> int:
        """Pages that the request owns at most on the way to ``computed`` tokens.

        Args:
            computed: tokens.
            step: most tokens of the steps under way. A request that was preempted computes its
                answer anew in such steps, and the one of the first cut then goes on behind it.

        """
        cut = self.first_cut
        if cut is None or computed < cut:
            return self.pages(computed)
        crossing = self.pages(min(computed, cut + step - 1))
        return max(crossing, self.pages(computed) - len(self.given_back(computed)))

    def given_back(self, computed: int) -> range:
        """Row indices of the pages that nothing reads once ``computed`` tokens are computed."""
        return range(self.plan.ring_pages, self.store_row(computed))

    def is_cut(self, before: int, after: int, keep: int | None = None) -> bool:
        """Whether the step from ``before`` to ``after`` computed tokens drops or moves any."""
        fresh = after - before
        dropped = self.held(after, keep) != self.held(before, keep) + fresh
        return dropped or self.moved(before) != self.moved(after)

    def _peak_held(self, computed: int) -> int:
        """Tokens for which the current region of the row has, or once had, pages."""
        moving = self.first_cut is not None and computed < self.first_cut
        return computed if moving else self.most_held(computed)
