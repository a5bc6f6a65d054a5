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
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import numpy as np
import torch

from cache_policies.kernels.contract import Reads
from cache_policies.kernels.counts import beside

if TYPE_CHECKING:
    from collections.abc import Callable

    from cache_policies.kernels.contract import Batch
    from cache_policies.pages.plan import Plan
    from cache_policies.retention.adaptive import Budgets

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Division:
    """How the full pages of a request are divided among the heads of a layer; equal to itself only.

    Attributes:
        budgets: what the host knows of it.
        pages: ``[num_kv_heads]`` int64, full pages of each head.

    """

    budgets: Budgets
    pages: torch.Tensor

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


@dataclass
class Latest(Generic[T]):
    """The value made last, kept while what it was made from stays the same."""

    _source: object = None
    _value: T | None = None

    def of(self, source: object, make: Callable[[], T]) -> T:
        """What ``make`` returns, or returned when it was last called for an equal ``source``."""
        if self._value is None or self._source != source:
            self._source, self._value = source, make()
        return self._value


class Columns(NamedTuple):
    """What the host knows of every request of a batch, beside its pages: ``[num_seqs]`` int32.

    Attributes:
        most: full pages of the longest head that a request could have; 0 where heads are even.
        move: how far behind its own index in the row a tail page's index in the slot map is.
        first: index in the row of the first full page, in heads' places.
        stored: store pages of uneven requests, in the slot map.

    """

    most: torch.Tensor
    move: torch.Tensor
    first: torch.Tensor
    stored: torch.Tensor


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

    def given(self, divisions: dict[int, Division], latest: Latest[torch.Tensor]) -> Batch:
        """The batch of a layer in which the uneven requests are divided so.

        Args:
            divisions: by request.
            latest: the layer's last slot map, which changes only with the requests, at cuts and
                where one takes another page.

        """
        if not self.uneven:
            return self.batch
        slots = latest.of((divisions, self._form), lambda: self._map(divisions))
        return self.batch.with_slots(slots)

    def reads(self, divisions: dict[int, Division], latest: Latest[Reads]) -> Reads | None:
        """The store pages that each head has; None where every head has all of them."""
        if not self.uneven:
            return None
        source = divisions, self.batch.num_seqs, self._stored
        return latest.of(source, lambda: self._lists(divisions))

    def _map(self, divisions: dict[int, Division]) -> torch.Tensor:
        """``[num_seqs, num_kv_heads, width]`` int32; see ``Batch.slots``."""
        end = self._of_all(divisions).cumsum(1, dtype=torch.int32)[..., None]
        # Where a head lacks a page this is the place of another head's, or of its own.
        place = (end + self._behind[:, None]).clamp(min=0) + self._columns.first[:, None, None]
        full = (self._behind < 0) & (self._index >= self.plan.ring_pages)
        return torch.where(full[:, None], place, self._plain)

    def _lists(self, divisions: dict[int, Division]) -> Reads:
        """One list a request, of the pages that each head has."""
        columns, device = self._columns, self._index.device
        lacks = columns.most[:, None] - self._of_all(divisions)
        number = torch.arange(max(self._stored.values()), dtype=torch.int32, device=device)
        count = torch.where(columns.most[:, None] > 0, columns.stored[:, None] - lacks, -1)
        first = torch.arange(self.batch.num_seqs, dtype=torch.int32, device=device)
        return Reads(lacks[..., None] + number, count, first)

    def _of_all(self, divisions: dict[int, Division]) -> torch.Tensor:
        """``[num_seqs, num_kv_heads]`` int32, full pages of each head; 0 in even requests."""
        none = torch.zeros(self.heads, dtype=torch.int64, device=self._index.device)
        given = {seq: divisions[seq].pages for seq in self.uneven}
        return torch.stack([given.get(seq, none) for seq in range(self.batch.num_seqs)]).int()

    @cached_property
    def _stored(self) -> dict[int, int]:
        """Store pages of the uneven requests, in their slot maps."""
        stored = self.batch.host.stored
        return {seq: self.plan.store_pages(int(stored[seq])) for seq in self.uneven}

    @cached_property
    def _form(self) -> tuple[object, ...]:
        """What a slot map follows from, beside the divisions."""
        return self.batch.num_seqs, self.batch.block_table.shape[1], self._width, self.uneven

    @cached_property
    def _width(self) -> int:
        """Row indices of a slot map."""
        host = self.batch.host
        pages = self.plan.store_pages(np.maximum(host.stored, host.stored_after))
        return max(1, self.plan.ring_pages, int((host.store_row + pages).max()))

    @cached_property
    def _columns(self) -> Columns:
        count = self.batch.num_seqs
        host = np.zeros((4, count), dtype=np.int32)
        for seq, (budgets, row) in self.uneven.items():
            move = row + budgets.pages - self.plan.ring_pages - budgets.most
            host[:, seq] = budgets.most, move, row * self.heads, self._stored[seq]
        return Columns(*beside(list(torch.from_numpy(host)), self.batch.block_table.device))

    @cached_property
    def _index(self) -> torch.Tensor:
        """``[width]`` int32: 0, 1, 2, ..."""
        return torch.arange(self._width, dtype=torch.int32, device=self.batch.block_table.device)

    @cached_property
    def _behind(self) -> torch.Tensor:
        """``[num_seqs, width]`` int32, how far behind a request's last full page an index is."""
        return self._index - (self.plan.ring_pages + self._columns.most)[:, None]

    @cached_property
    def _plain(self) -> torch.Tensor:
        """``[num_seqs, num_kv_heads, width]`` int32: ring, tail and plain pages, of every head."""
        moved = torch.where(self._behind < 0, 0, self._columns.move[:, None])
        # Beyond a request's own pages any place will do.
        rows = (self._index + moved).clamp(max=self.batch.block_table.shape[1] - 1)
        own = torch.arange(self.heads, dtype=torch.int32, device=rows.device)
        return rows[:, None] * self.heads + own[:, None]
