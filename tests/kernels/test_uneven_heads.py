"""Heads of a layer that own unequal numbers of pages: each is as if it were a layer of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_policies.kernels.contract import Batch, Kernel, Mass, Reads
from cache_policies.kernels.cpu import CpuKernel, supported_isas
from cache_policies.kernels.reference import ReferenceKernel
from cache_policies.pages.codecs import CODECS
from cache_policies.pages.plan import Plan
from tests.kernels.harness import Setup

PAGE, HEADS, GROUP = 128, 3, 2
POLICIES = st.sampled_from(list(CODECS))
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
    def make(cls, policy: str, full: list[int], lead: int, tail: int, fresh: int) -> Uneven:
        room = PAGE * sum(full) // HEADS + TAIL
        together = Setup.make(policy, seqs=2, heads=HEADS * GROUP, kv_heads=HEADS, max_tokens=room)
        alone = []
        for head, pages in enumerate(full):
            one = Setup.make(
                policy, seqs=1, heads=GROUP, kv_heads=1, max_tokens=PAGE * pages + TAIL, seed=head
            )
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


FULL = st.lists(st.integers(0, 4), min_size=2, max_size=2).map(lambda n: [*n, 9 - sum(n)])


def _kernels(setup: Setup, isa: str) -> list[Kernel]:
    cpu = CpuKernel(setup.layout, setup.shape, isa=isa, rounding=False, num_threads=2)
    return [ReferenceKernel(setup.layout, setup.shape), cpu]


def _mass(batch: Batch, heads: int) -> Mass:
    held = int(batch.stored[0] + batch.ring[0] + batch.query_start[1])
    zero, place = torch.zeros((2, batch.num_seqs), dtype=torch.int32)
    place[1:] = -1
    return Mass(zero, zero, place, torch.zeros(heads, held))


def _nothing_fresh(batch: Batch) -> Batch:
    stored = int(batch.stored[0])
    row = int(batch.store_row[0])
    return batch.one(0, held=stored + int(batch.ring[0]), stored=stored, store_row=row)


@pytest.mark.parametrize("isa", supported_isas())
@settings(max_examples=20, deadline=None)
@given(policy=POLICIES, full=FULL, lead=st.integers(0, 2), tail=st.sampled_from([0, 5, 128, 170]),
       fresh=st.sampled_from([1, 40, 128]))  # fmt: skip
def test_attention_mass_and_appending(
    isa: str, policy: str, full: list[int], lead: int, tail: int, fresh: int
) -> None:
    setups = [Uneven.make(policy, full, lead, tail, fresh) for _ in range(2)]
    for uneven, kernel in zip(setups, _kernels(setups[0].together, isa), strict=True):
        query, key, value = uneven.tokens()
        batch, output, pages = uneven.batch(), torch.zeros_like(query), uneven.together.pages
        mass = _mass(batch, HEADS)
        kernel.attend(pages, batch, query, key, value, output, mass, uneven.reads())
        kernel.append(pages, batch, key, value)
        after = batch.after_append()
        held, heldv = kernel.read(pages, after.row(0), key, value)
        for head, one in enumerate(uneven.alone):
            alone, parts = uneven.of_head(head)
            oracle = ReferenceKernel(one.layout, one.shape)
            expected, counted = torch.zeros_like(parts[0]), _mass(alone, 1)
            oracle.attend(one.pages, alone, *parts, expected, counted)
            got = output[:fresh, head * GROUP : (head + 1) * GROUP]
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
            lacks = (uneven.virtual - full[head]) * PAGE
            assert not mass.out[head, :lacks].any()
            torch.testing.assert_close(mass.out[head, lacks:], counted.out[0], rtol=2e-3, atol=2e-4)
            oracle.append(one.pages, alone, parts[1], parts[2])
            key1, value1 = oracle.read(one.pages, alone.after_append(), *parts[1:])
            torch.testing.assert_close(held[head, lacks:], key1[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(heldv[head, lacks:], value1[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", supported_isas())
@settings(max_examples=20, deadline=None)
@given(policy=POLICIES, full=FULL, lead=st.integers(0, 2), tail=st.sampled_from([0, 5, 128, 170]),
       threads=st.sampled_from([1, 2]))  # fmt: skip
def test_what_is_written_is_read_back_and_no_other_page_is_touched(
    isa: str, policy: str, full: list[int], lead: int, tail: int, threads: int
) -> None:
    uneven = Uneven.make(policy, full, lead, tail, 1)
    batch = _nothing_fresh(uneven.batch())
    held = int(batch.stored + batch.ring)
    rng = torch.Generator().manual_seed(3)
    key, value = torch.randn(2, HEADS, held, 64, generator=rng)
    index = torch.arange(held, dtype=torch.int32).repeat(HEADS, 1)
    for head, pages in enumerate(full):
        index[head, : (uneven.virtual - pages) * PAGE] = -1
    written = []
    setup = uneven.together
    for kernel in (ReferenceKernel(setup.layout, setup.shape),
                   CpuKernel(setup.layout, setup.shape, isa=isa, num_threads=threads)):  # fmt: skip
        pages = setup.pages.clone()
        kernel.write(pages, batch, index, key.clone(), value.clone())
        written.append(pages)
        others = setup.block_table[1].long()
        assert torch.equal(pages[others], setup.pages[others])
        got, _ = kernel.read(pages, batch, *torch.empty(2, 0, HEADS, 64), index)
        assert not got[index < 0].any()
        for head, one in enumerate(uneven.alone):
            alone = _nothing_fresh(uneven.of_head(head)[0])
            lacks = (uneven.virtual - full[head]) * PAGE
            oracle = ReferenceKernel(one.layout, one.shape)
            order = torch.arange(held - lacks, dtype=torch.int32)[None]
            parts = (x[head : head + 1, lacks:] for x in (key, value))
            oracle.write(one.pages, alone, order, *parts)
            key1, _ = oracle.read(one.pages, alone, *torch.empty(2, 0, 1, 64))
            torch.testing.assert_close(got[head, lacks:], key1[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(*written)


@pytest.mark.parametrize("absent", [slice(0, 100), slice(128, 256), slice(500, 512)])
def test_a_page_is_absent_whole_and_first(absent: slice) -> None:
    setup = Setup.make("kivi-4bit", seqs=1)
    batch = setup.batch([512], [1]).one(0, held=512, stored=512, store_row=setup.layout.ring_pages)
    index = torch.arange(512, dtype=torch.int32).repeat(2, 1)
    index[1, absent] = -1
    x = torch.zeros(2, 512, 64)
    with pytest.raises(ValueError, match="write whole pages"):
        CpuKernel(setup.layout, setup.shape).write(setup.pages, batch, index, x, x)
