"""Tokens that go to other places: whole groups keep their bytes, others are encoded anew."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_policies.kernels.cpu import CpuKernel, supported_isas
from cache_policies.kernels.moves import Moves, move, move_rows
from cache_policies.kernels.reference import ReferenceKernel
from cache_policies.pages.plan import Plan
from tests.kernels.harness import Setup

if TYPE_CHECKING:
    from cache_policies.kernels.contract import Batch

GROUPED = (
    "kivi-4bit", "kivi-2bit", "kivi(k_bits=2,v_bits=4)", "kivi(k_bits=8,v_bits=8)",
    "kivi-4bit(group=16,residual=64)", "kivi-2bit(group=64)", "kivi-4bit(group=32,residual=32)",
)  # fmt: skip
POLICIES = st.sampled_from((*GROUPED, "fp16", "rotated-4bit"))
LENGTHS = st.sampled_from([40, 128, 300, 512, 600])
FRESH, HEADS = 40, 2


def _kept(candidates: int, rng: torch.Generator) -> torch.Tensor:
    """Numbers of tokens that stay, ascending: some runs of them, which often hold whole groups."""
    drops = torch.zeros(candidates, dtype=torch.bool)
    for _ in range(3):
        first, count = (int(x) for x in torch.randint(candidates, (2,), generator=rng))
        aligned = bool(torch.randint(2, (), generator=rng))
        span = (x // 64 * 64 if aligned else x for x in (first, first + count // 4))
        drops[slice(*span)] = True
    return (~drops).nonzero().flatten().int()


def _case(
    policy: str, held: list[int], seed: int, in_place: bool, mapped: bool
) -> tuple[Setup, Moves, torch.Tensor, torch.Tensor]:
    """Pages, what moves in them, and the step's keys and values."""
    rng = torch.Generator().manual_seed(seed)
    setup = Setup.make(policy, seqs=len(held), kv_heads=HEADS, max_tokens=1500)
    plan = Plan.of(setup.layout)
    seqs, row = setup.block_table.shape
    places = [torch.randperm(row * HEADS, generator=rng).view(HEADS, row) for _ in range(seqs)]
    slots = torch.stack(places).int() if mapped else None
    kernel = ReferenceKernel(setup.layout, setup.shape)
    _, key, value = setup.tokens(sum(held), seed)
    kernel.append(setup.pages, replace(setup.batch([0] * seqs, held), slots=slots), key, value)
    before = replace(setup.batch(held, [FRESH] * seqs), slots=slots)
    _, key, value = setup.tokens(FRESH * seqs, seed + 1)
    if seed % 2:
        kernel.append(setup.pages, before, key, value)
        before = before.after_append()
    else:
        before.appended.zero_()
    numbers = [_kept(h + FRESH, rng).expand(HEADS, -1) for h in held]
    counts = torch.tensor([n.shape[1] for n in numbers], dtype=torch.int32)
    stored = torch.from_numpy(plan.stored(counts.numpy()))
    behind = before.store_row + 6  # where no token of the source is
    target = replace(
        before, stored=stored, ring=counts - stored, stored_after=stored,
        store_row=before.store_row if in_place else behind,
    )  # fmt: skip
    start = torch.cat([torch.zeros(1), counts.cumsum(0)]).int()
    index = torch.cat([torch.arange(int(n), dtype=torch.int32) for n in counts])
    index = index.expand(HEADS, -1).contiguous()
    return setup, Moves(before, target, index, torch.cat(numbers, 1), start), key, value


@pytest.mark.parametrize("isa", supported_isas())
@settings(max_examples=25, deadline=None)
@given(policy=POLICIES, held=st.lists(LENGTHS, min_size=1, max_size=3), seed=st.integers(0, 999),
       in_place=st.booleans(), mapped=st.booleans())  # fmt: skip
def test_whole_groups_are_copied_and_others_are_as_rewritten(
    isa: str, policy: str, held: list[int], seed: int, in_place: bool, mapped: bool
) -> None:
    setup, moves, key, value = _case(policy, held, seed, in_place, mapped)
    kernel = CpuKernel(setup.layout, setup.shape, isa=isa, num_threads=2)
    oracle = ReferenceKernel(setup.layout, setup.shape)
    oracle.read, oracle.write = kernel.read, kernel.write  # type: ignore[method-assign]
    expected, got = setup.pages.clone(), setup.pages.clone()
    oracle.move(expected, key, value, moves)
    kernel.move(got, key, value, moves)
    assert torch.equal(got, expected)


def _decoded(setup: Setup, batch: Batch, pages: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """All stored tokens of the first request, keys and values side by side."""
    kernel = ReferenceKernel(setup.layout, setup.shape)
    row = batch.row(0)
    return torch.cat(kernel.read(pages, row, key[:FRESH], key[:FRESH]), -1)


@settings(max_examples=30, deadline=None)
@given(policy=st.sampled_from(GROUPED), held=LENGTHS, seed=st.integers(0, 999),
       in_place=st.booleans())  # fmt: skip
def test_tokens_that_stay_together_stay_as_they_are(
    policy: str, held: int, seed: int, in_place: bool
) -> None:
    """Against the codec: what a whole group decodes to is the same, bit for bit."""
    setup, moves, key, value = _case(policy, [held], seed, in_place, mapped=False)
    before = _decoded(setup, moves.source, setup.pages, key)
    ReferenceKernel(setup.layout, setup.shape).move(setup.pages, key, value, moves)
    after = _decoded(setup, moves.target, setup.pages, key)
    unit = max(32, setup.layout.codec.divisor)
    stored, number = int(moves.source.stored[0]), moves.number[0].long()
    for to in range(0, int(moves.target.stored[0]), unit):
        first = int(number[to])
        together = torch.equal(number[to : to + unit], torch.arange(first, first + unit))
        if together and first % unit == 0 and first + unit <= stored:
            assert torch.equal(after[:, to : to + unit], before[:, first : first + unit])


def test_a_cut_that_drops_nothing_changes_no_byte() -> None:
    """Not so by way of floats: scales and minima are rounded a second time."""
    setup, moves, key, value = _case("kivi-2bit", [512], 0, in_place=True, mapped=False)
    everything = torch.arange(512, dtype=torch.int32).expand(HEADS, -1).contiguous()
    start = torch.tensor([0, 512], dtype=torch.int32)
    stays = replace(moves, target=moves.source, index=everything, number=everything, start=start)
    kernel = CpuKernel(setup.layout, setup.shape)
    pages = setup.pages.clone()
    kernel.move(pages, key, value, stays)
    assert torch.equal(pages, setup.pages)


def test_moves_backwards_are_refused() -> None:
    setup, moves, key, value = _case("kivi-4bit", [512], 0, in_place=True, mapped=False)
    number = moves.number.clone()
    number[0, 100] = 99
    kernel = CpuKernel(setup.layout, setup.shape)
    with pytest.raises(ValueError, match="backwards"):
        kernel.move(setup.pages, key, value, replace(moves, number=number))
    flipped = replace(moves, index=moves.index.flip(1).contiguous())
    with pytest.raises(ValueError, match="in order"):
        kernel.move(setup.pages, key, value, flipped)


@settings(max_examples=30, deadline=None)
@given(policy=st.sampled_from(GROUPED), held=LENGTHS, seed=st.integers(0, 999),
       ahead=st.integers(1, 7))  # fmt: skip
def test_pages_that_would_be_written_before_they_are_read_go_by_floats(
    policy: str, held: int, seed: int, ahead: int
) -> None:
    """A request without pages to spare keeps its tokens in its own pages, from another row on."""
    setup, moves, key, value = _case(policy, [held], seed, in_place=True, mapped=False)
    size = setup.layout.page_tokens
    moves = replace(moves, target=replace(moves.target, store_row=moves.source.store_row + ahead))
    kernel = CpuKernel(setup.layout, setup.shape)
    expected, got = setup.pages.clone(), setup.pages.clone()
    move_rows(kernel, expected, key, value, moves)
    move(kernel, size, got, key, value, moves)
    rows = -(-int(moves.source.stored[0]) // size)
    assert moves.mixes_pages(size) == (ahead < rows and int(moves.target.stored[0]) > 0)
    if moves.mixes_pages(size):
        assert torch.equal(got, expected)
        with pytest.raises(ValueError, match="pages are mixed"):
            kernel.move(got, key, value, moves)
    else:
        moved = setup.pages.clone()
        kernel.move(moved, key, value, moves)
        assert torch.equal(got, moved)
