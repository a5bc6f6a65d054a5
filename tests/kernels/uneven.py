"""A request whose heads own unequal numbers of pages, and each of its heads alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from cache_policies.kernels.contract import Batch, Mass, Reads
from cache_policies.pages.codecs.packing import LANES
from cache_policies.pages.plan import Plan
from tests.kernels.harness import Setup

PAGE, HEADS, GROUP = 128, 3, 2
TAIL = 300  # tokens of the longest tail, fresh ones included


@dataclass
class Uneven:
    """A request whose heads have ``full`` pages each, then all the same tail, beside a plain one.

    Attributes:
        together: the layer of all heads.
        alone: a layer of one head for each of them, with the same bytes in pages of its own.
        full: pages of each head before the tail.
        lead: pages that the longest head lacks too.
        tail: tokens behind the full pages, before the step.
        fresh: tokens of the step.

    """

    together: Setup
    alone: list[Setup]
    slots: torch.Tensor
    full: list[int]
    lead: int
    tail: int
    fresh: int

    @classmethod
    def make(
        cls, policy: str, full: list[int], lead: int, tail: int, fresh: int, packing: str = LANES
    ) -> Uneven:
        room = PAGE * sum(full) // HEADS + TAIL
        together = Setup.make(
            policy,
            seqs=2, heads=HEADS * GROUP, kv_heads=HEADS, max_tokens=room, packing=packing,
        )  # fmt: skip
        alone = []
        for head, pages in enumerate(full):
            one = Setup.make(
                policy,
                seqs=1, heads=GROUP, kv_heads=1, max_tokens=PAGE * pages + TAIL, seed=head,
                packing=packing,
            )  # fmt: skip
            one.fill([PAGE * pages + tail], seed=head)
            alone.append(one)
        together.fill([0, 200])
        uneven = cls(together, alone, torch.zeros(0), full, lead, tail, fresh)
        uneven._place()
        return uneven

    @property
    def virtual(self) -> int:
        """Full pages of the longest head, and those that it lacks too."""
        return max(self.full) + self.lead

    def _place(self) -> None:
        """Give heads places anywhere in the row; copy their bytes there."""
        ring, row = self.together.layout.ring_pages, self.together.block_table.shape[1]
        own = torch.arange(HEADS)
        mean = sum(self.full) // HEADS
        plain = torch.arange(row)[None] * HEADS + own[:, None]
        behind = plain[:, ring + mean :]
        places = torch.randperm(mean * HEADS, generator=torch.Generator().manual_seed(5))
        places += ring * HEADS
        store = torch.full((HEADS, self.virtual), int(places[0]))
        done = 0
        for head, pages in enumerate(self.full):
            store[head, self.virtual - pages :] = places[done : done + pages]
            done += pages
        uneven = torch.cat([plain[:, :ring], store, behind], 1)
        padding = torch.zeros(HEADS, self.virtual - mean, dtype=torch.long)
        self.slots = torch.stack([uneven, torch.cat([plain, padding], 1)]).int()
        for head, one in enumerate(self.alone):
            lacks = self.virtual - self.full[head]
            at = [*range(ring), *range(ring + lacks, uneven.shape[1])]
            for source, i in zip(one.block_table[0].tolist(), at, strict=False):
                slot = int(uneven[head, i])
                page = self.together.block_table[0, slot // HEADS]
                self.together.pages[page, slot % HEADS] = one.pages[source, 0]

    def batch(self) -> Batch:
        """Both requests; the plain one has a fresh token."""
        held = [self.virtual * PAGE + self.tail, 200]
        return replace(self.together.batch(held, [self.fresh, 1]), slots=self.slots)

    def reads(self) -> Reads:
        """The pages that each head has."""
        plan = Plan.of(self.together.layout)
        total = self.virtual + int(plan.store_pages(self.tail))
        pages = torch.zeros(2, HEADS, total, dtype=torch.int32)
        count = torch.full((2, HEADS), -1, dtype=torch.int32)
        for head, full in enumerate(self.full):
            there = torch.arange(self.virtual - full, total)
            pages[0, head, : len(there)], count[0, head] = there, len(there)
        return Reads(pages, count, torch.arange(2, dtype=torch.int32))

    def tokens(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.together.tokens(self.fresh + 1, seed=9)

    def of_head(self, head: int) -> tuple[Batch, list[torch.Tensor]]:
        """The first request's batch and fresh tokens in the layer of one head."""
        batch = self.alone[head].batch([self.full[head] * PAGE + self.tail], [self.fresh])
        query, key, value = (x[: self.fresh] for x in self.tokens())
        group = slice(head * GROUP, (head + 1) * GROUP)
        parts = query[:, group], key[:, head : head + 1], value[:, head : head + 1]
        return batch, [x.contiguous() for x in parts]


def mass_of_first(batch: Batch, heads: int) -> Mass:
    held = int(batch.stored[0] + batch.ring[0] + batch.query_start[1])
    zero, place = torch.zeros((2, batch.num_seqs), dtype=torch.int32)
    place[1:] = -1
    return Mass(zero, zero, place, torch.zeros(heads, held))


def nothing_fresh(batch: Batch) -> Batch:
    stored = int(batch.stored[0])
    row = int(batch.store_row[0])
    return batch.one(0, held=stored + int(batch.ring[0]), stored=stored, store_row=row)
