"""Requests whose heads own unequal numbers of pages: which place of the row is whose.

For the kernels such a request is as long as its longest head could be. Its slot map begins with
the ring, then come the full pages of that head; other heads lack the first of these::

    slot map, head 0    [ring] [  ] [  ] [p0] [p1]   [tail][growth]..
              head 1    [ring] [p0] [p1] [p2] [p3]   [tail][growth]..

The places of the row that uniform heads would fill are given to the heads one after the other;
ring, tail and what is appended later lie in every head's own place of the page.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from cache_policies.kernels.counts import beside

if TYPE_CHECKING:
    from cache_policies.kernels.contract import Batch
    from cache_policies.pages.plan import Plan
    from cache_policies.retention.adaptive import Budgets


@dataclass
class Division:
    """How the full pages of a request are divided among the heads of a layer.

    Attributes:
        budgets: what the host knows of it.
        pages: ``[num_kv_heads]`` int64, full pages of each head.

    """

    budgets: Budgets
    pages: torch.Tensor
    _reads: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, budgets: Budgets, kept: torch.Tensor) -> Division:
        """From the tokens kept, as ``Budgets.select`` returned them."""
        count = (kept >= 0).sum(1) - budgets.tail
        return cls(budgets, count // budgets.page_tokens)

    @cached_property
    def places(self) -> torch.Tensor:
        """``[num_kv_heads, most]`` int32: whose place each full page is, counted from the first.

        Where a head lacks a page this is the place of another head's, or of its own.
        """
        most = self.budgets.most
        end = self.pages.cumsum(0)[:, None]
        place = end - most + torch.arange(most, device=self.pages.device)
        return place.clamp(min=0).int()

    def packed(self, kept: torch.Tensor) -> torch.Tensor:
        """What is known of kept tokens ``[num_kv_heads, places]``, without those a head lacks.

        Returns:
            ``[num_kv_heads, tokens a head keeps on average]``, in the order of the places in the
            row; the reverse of ``unpacked``.

        """
        heads, size = kept.shape[0], self.budgets.page_tokens
        full, tail = kept.split([self.budgets.most * size, self.budgets.tail], 1)
        place = self.places.masked_fill(self._lacks, heads * self.budgets.pages)  # a last one
        rows = full.new_empty(heads * self.budgets.pages + 1, size)
        rows[place.flatten().long()] = full.reshape(-1, size)
        return torch.cat([rows[:-1].view(heads, -1), tail], 1)

    def unpacked(self, packed: torch.Tensor) -> torch.Tensor:
        """``[num_kv_heads, places]``; -1 for tokens that a head lacks."""
        heads, size = packed.shape[0], self.budgets.page_tokens
        full, tail = packed.split([self.budgets.pages * size, self.budgets.tail], 1)
        rows = full.reshape(-1, size)[self.places.long()]
        rows = rows.masked_fill(self._lacks[..., None], -1)
        return torch.cat([rows.view(heads, -1), tail], 1)

    @property
    def _lacks(self) -> torch.Tensor:
        number = torch.arange(self.budgets.most, device=self.pages.device)
        return number < (self.budgets.most - self.pages)[:, None]

    def reads(self, pages: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The store pages that each head has, of ``pages`` in its slot map.

        Returns:
            their numbers ``[1, num_kv_heads, pages]``, and how many of these ``[1, num_kv_heads]``,
            both int32.

        """
        if pages not in self._reads:  # until the tail takes another page
            first = (self.budgets.most - self.pages)[None, :, None].int()
            each = first + torch.arange(pages, dtype=torch.int32, device=first.device)
            self._reads = {pages: (each, pages - first[..., 0])}
        return self._reads[pages]


@dataclass(frozen=True)
class Slots:
    """Slot maps of the layers that share a batch's counts.

    Attributes:
        batch: whose counts hold, for uneven requests, what their longest head could hold.
        plan: the codec's arithmetic.
        heads: KV heads.
        uneven: by request its budgets, and the index in the block table of its first full page.

    """

    batch: Batch
    plan: Plan
    heads: int
    uneven: dict[int, tuple[Budgets, int]] = field(default_factory=dict)

    def given(self, divisions: dict[int, Division]) -> Batch:
        """The batch of a layer in which the uneven requests are divided so."""
        if not self.uneven:
            return self.batch
        slots, ring = self._plain.clone(), self.plan.ring_pages
        for seq, (budgets, row) in self.uneven.items():
            span = slots[seq, :, ring : ring + budgets.most]
            torch.add(divisions[seq].places, row * self.heads, out=span)
        return self.batch.with_slots(slots)

    @cached_property
    def _plain(self) -> torch.Tensor:
        """``[num_seqs, num_kv_heads, width]`` int32: ring, tail and plain pages, of every head."""
        own = torch.arange(self.heads, dtype=torch.int32, device=self._rows.device)
        return self._rows[:, None] * self.heads + own[:, None]

    @cached_property
    def _rows(self) -> torch.Tensor:
        """``[num_seqs, width]`` int32, index in the block table of ring, tail and plain pages."""
        host, table, ring = self.batch.host, self.batch.block_table, self.plan.ring_pages
        pages = self.plan.store_pages(np.maximum(host.stored, host.stored_after))
        width = max(1, ring, int((host.store_row + pages).max()))
        behind, move = np.full((2, self.batch.num_seqs), [[width], [0]], dtype=np.int32)
        for seq, (budgets, row) in self.uneven.items():
            behind[seq] = ring + budgets.most
            move[seq] = row + budgets.pages - behind[seq]
        counts = (torch.from_numpy(behind), torch.from_numpy(move))
        behind_, move_ = (x[:, None] for x in beside(counts, table.device))
        index = torch.arange(width, dtype=torch.int32, device=table.device)
        # Beyond a request's own pages any place will do.
        return torch.where(index < behind_, index, index + move_).clamp(max=table.shape[1] - 1)
