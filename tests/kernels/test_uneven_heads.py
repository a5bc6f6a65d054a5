"""Heads of a layer that own unequal numbers of pages: each is as if it were a layer of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_policies.kernels.cpu import CpuKernel, supported_isas
from cache_policies.kernels.reference import ReferenceKernel
from cache_policies.pages.codecs import CODECS
from tests.kernels.harness import Setup
from tests.kernels.uneven import GROUP, HEADS, PAGE, Uneven, mass_of_first, nothing_fresh

if TYPE_CHECKING:
    from cache_policies.kernels.contract import Kernel

POLICIES = st.sampled_from(list(CODECS))
FULL = st.lists(st.integers(0, 4), min_size=2, max_size=2).map(lambda n: [*n, 9 - sum(n)])


def _kernels(setup: Setup, isa: str) -> list[Kernel]:
    cpu = CpuKernel(setup.layout, setup.shape, isa=isa, rounding=False, num_threads=2)
    return [ReferenceKernel(setup.layout, setup.shape), cpu]


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
        mass = mass_of_first(batch, HEADS)
        kernel.attend(pages, batch, query, key, value, output, mass, uneven.reads())
        kernel.append(pages, batch, key, value)
        after = batch.after_append()
        held, heldv = kernel.read(pages, after.row(0), key, value)
        for head, one in enumerate(uneven.alone):
            alone, parts = uneven.of_head(head)
            oracle = ReferenceKernel(one.layout, one.shape)
            expected, counted = torch.zeros_like(parts[0]), mass_of_first(alone, 1)
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
    batch = nothing_fresh(uneven.batch())
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
            alone = nothing_fresh(uneven.of_head(head)[0])
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
