"""What evicting and retrieving methods need of the kernels, against the reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_policies.kernels.contract import Batch, Reads
from cache_policies.kernels.cpu import CpuKernel, supported_isas
from cache_policies.kernels.reference import ReferenceKernel
from cache_policies.pages.codecs import CODECS
from tests.kernels.cases import HELD, mass_of
from tests.kernels.harness import CAPS, Setup

POLICIES = st.sampled_from(list(CODECS))


def _attend_both(setup: Setup, batch: Batch, isa: str, **options: object) -> list[torch.Tensor]:
    count = int(batch.query_start[-1])
    query, key, value = setup.tokens(count, seed=9)
    outputs = []
    kernels = (
        ReferenceKernel(setup.layout, setup.shape),
        CpuKernel(setup.layout, setup.shape, isa=isa, rounding=False, num_threads=2),
    )
    for kernel, chosen in zip(kernels, options["each"], strict=True):  # type: ignore[call-overload]
        output = torch.zeros_like(query)
        kernel.attend(setup.pages, batch, query, key, value, output, **chosen)
        outputs.append(output)
    return outputs


@pytest.mark.parametrize("isa", supported_isas())
@settings(max_examples=25, deadline=None)
@given(policy=POLICIES, computed=st.lists(HELD, min_size=2, max_size=2), seed=st.integers(0, 99),
       soft_cap=CAPS, sinks=st.booleans())  # fmt: skip
def test_mass_equals_the_sums_of_the_softmax(
    isa: str, policy: str, computed: list[int], seed: int, soft_cap: float, sinks: bool
) -> None:
    rng = np.random.default_rng(seed)
    setup = Setup.make(policy, heads=6, kv_heads=2, max_tokens=900, soft_cap=soft_cap, sinks=sinks)
    setup.fill(computed)
    fresh = [int(rng.choice([1, 7, 129, 200])) for _ in computed]
    batch = setup.batch(computed, fresh)
    first_query = [int(rng.integers(0, fresh[0])), -1 if seed % 2 else 0]
    first_token = [0, int(rng.integers(0, 300))]
    masses = [mass_of(setup, batch, first_query, first_token) for _ in range(2)]
    outputs = _attend_both(setup, batch, isa, each=[{"mass": m} for m in masses])
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(masses[1].out, masses[0].out, rtol=2e-3, atol=2e-4)
    held = int(batch.stored[0] + batch.ring[0]) + fresh[0]
    counted = masses[1].out[:, int(masses[1].place[0]) :][:, :held] - 0.5
    queries = (fresh[0] - first_query[0]) * setup.shape.num_heads // setup.shape.num_kv_heads
    if sinks:
        assert (counted.sum(1) < queries).all()  # the sinks have the rest
    else:
        whole = torch.full((2,), float(queries))
        torch.testing.assert_close(counted.sum(1), whole, rtol=1e-3, atol=0)


@settings(max_examples=25, deadline=None)
@given(policy=POLICIES, seed=st.integers(0, 99))
def test_only_chosen_pages_are_read(policy: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    computed = [640, 300]
    setup = Setup.make(policy, heads=6, kv_heads=2, max_tokens=900)
    setup.fill(computed)
    batch = setup.batch(computed, [int(rng.choice([1, 40])), 1])
    pages = torch.zeros(2, 2, 5, dtype=torch.int32)
    for head in range(2):
        pages[0, head, :3] = torch.tensor(sorted(rng.choice(5, 3, replace=False)))
    reads = Reads(pages, torch.tensor([[3, 3], [-1, -1]], dtype=torch.int32), torch.arange(2).int())
    outputs = _attend_both(setup, batch, supported_isas()[0], each=[{"reads": reads}] * 2)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    everything = _attend_both(setup, batch, supported_isas()[0], each=[{}] * 2)[0]
    assert not torch.allclose(everything[0], outputs[0][0], atol=1e-3)
    torch.testing.assert_close(everything[-1], outputs[0][-1])


@settings(max_examples=40, deadline=None)
@given(policy=POLICIES, held=HELD, fresh=st.sampled_from([0, 1, 5]), seed=st.integers(0, 99))
def test_tokens_are_read_alike(policy: str, held: int, fresh: int, seed: int) -> None:
    setup = Setup.make(policy, seqs=1, max_tokens=700)
    setup.fill([held])
    _, key, value = setup.tokens(fresh, seed=4)
    stored = held - int(setup.batch([held], [1]).ring[0])
    batch = setup.batch([held], [1]).one(
        0, held=held, stored=stored, store_row=setup.layout.ring_pages, fresh=range(fresh)
    )
    rng = torch.Generator().manual_seed(seed)
    total = held + fresh
    index = torch.randint(total, (2, min(total, 50)), generator=rng).int() if total else None
    kernels = [kernel(setup.layout, setup.shape) for kernel in (ReferenceKernel, CpuKernel)]
    for chosen in (None, index):
        expected, got = (k.read(setup.pages, batch, key, value, chosen) for k in kernels)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(policy=POLICIES, held=HELD, seed=st.integers(0, 99))
def test_what_is_written_is_read_back(policy: str, held: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    results = []
    data = torch.randn(2, 2, held, 64, generator=rng)
    for kernel in (ReferenceKernel, CpuKernel):
        setup = Setup.make(policy, seqs=1, max_tokens=1400)
        base = setup.layout.ring_pages + 3  # some pages behind those of the prompt
        stored = int(setup.batch([held], [1]).stored[0])
        batch = setup.batch([held], [1]).one(0, held=held, stored=stored, store_row=base)
        index = torch.arange(held, dtype=torch.int32).expand(2, -1).contiguous()
        one = kernel(setup.layout, setup.shape)
        one.write(setup.pages, batch, index, data[0].clone(), data[1].clone())
        empty = torch.empty(0, 2, 64)
        results.append(one.read(setup.pages, batch, empty, empty))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
    error = (results[1][0] - data[0]).abs().max() if held else torch.zeros(())
    assert error < {"raw": 1e-6, "fp16": 3e-3, "bf16": 3e-2, "int8": 3e-2}.get(policy, 1.5)


@pytest.mark.parametrize("isa", supported_isas())
@settings(max_examples=25, deadline=None)
@given(
    policy=POLICIES,
    held=st.lists(HELD, min_size=2, max_size=4),
    fresh=st.sampled_from([1, 40, 129]),
    seed=st.integers(0, 99),
)
def test_several_requests_are_read_and_written_at_once(
    isa: str, policy: str, held: list[int], fresh: int, seed: int
) -> None:
    """Some of their tokens, fresh ones that are appended already left out, into other pages."""
    rng = torch.Generator().manual_seed(seed)
    setup = Setup.make(policy, seqs=len(held), max_tokens=2200)
    setup.fill(held)
    _, key, value = setup.tokens(fresh * len(held), seed=4)
    before = setup.batch(held, [fresh] * len(held))
    kernels = (
        ReferenceKernel(setup.layout, setup.shape),
        CpuKernel(setup.layout, setup.shape, isa=isa, num_threads=2),
    )
    batch = before
    if seed % 2:
        kernels[0].append(setup.pages, before, key, value)
        batch = before.after_append()
    else:
        batch.appended.zero_()
    counts = [(h + fresh) // 2 if seed % 3 else 0 for h in held[:-1]] + [held[-1] + fresh]
    start = torch.tensor([0, *counts]).cumsum(0).int()
    parts = [
        torch.randint(-1, h + fresh, (2, n), generator=rng)
        for h, n in zip(held, counts, strict=True)
    ]
    index = torch.cat(parts, 1).int()
    read = [k.read(setup.pages, batch, key, value, index, start) for k in kernels]
    torch.testing.assert_close(read[1], read[0], rtol=1e-5, atol=1e-5)
    assert (read[1][0][index < 0] == 0).all()
    stored = torch.tensor([n // max(1, setup.layout.residual) for n in counts]).int()
    stored *= max(1, setup.layout.residual)
    after = replace(
        batch, stored=stored, ring=torch.tensor(counts).int() - stored,
        store_row=torch.full_like(stored, setup.layout.ring_pages + 6),
    )  # fmt: skip
    places = torch.cat([torch.arange(n) for n in counts]).int().expand(2, -1).contiguous()
    written = [setup.pages.clone(), setup.pages.clone()]
    for kernel, pages in zip(kernels, written, strict=True):
        kernel.write(pages, after, places, read[0][0].clone(), read[0][1].clone(), start)
    assert torch.equal(*written)
    one, most = len(held) - 1, slice(int(start[-2]), int(start[-1]))  # and it alone gives the same
    together = kernels[1].read(written[1], after, key, value, places, start)
    alone = kernels[1].read(written[1], after.row(one), key, value, places[:, most].contiguous())
    torch.testing.assert_close(alone[0], together[0][:, most])


@pytest.mark.parametrize("policy", ["raw", "fp16", "int8", "flexgen-4bit"])
def test_single_tokens_replace_others_and_no_more(policy: str) -> None:
    setup = Setup.make(policy, seqs=1, max_tokens=400)
    setup.fill([300])
    batch = setup.batch([300], [1]).one(0, held=300, stored=300, store_row=0)
    kernel = CpuKernel(setup.layout, setup.shape)
    empty = torch.empty(0, 2, 64)
    before = kernel.read(setup.pages, batch, empty, empty)[0].clone()
    index = torch.tensor([[5, 128, -1], [299, 0, 7]], dtype=torch.int32)
    new = torch.randn(2, 2, 3, 64, generator=torch.Generator().manual_seed(1))
    kernel.write(setup.pages, batch, index, new[0].clone(), new[1].clone())
    after = kernel.read(setup.pages, batch, empty, empty)[0]
    changed = (after - before).abs().amax(-1) > 0
    assert changed[0].nonzero().flatten().tolist() == [5, 128]
    assert changed[1].nonzero().flatten().tolist() == [0, 7, 299]
    torch.testing.assert_close(after[1, 299], new[0, 1, 0], rtol=0.05, atol=0.3)


def test_wrong_tokens_are_refused() -> None:
    setup = Setup.make("kivi-4bit", seqs=1)
    batch = setup.batch([128], [1]).one(0, held=128, stored=128, store_row=setup.layout.ring_pages)
    kernel = CpuKernel(setup.layout, setup.shape)
    index = torch.arange(128, dtype=torch.int32).expand(2, -1).contiguous()
    x = torch.zeros(2, 128, 64)
    with pytest.raises(ValueError, match="in order"):
        kernel.write(setup.pages, batch, index.flip(1).contiguous(), x, x)
    with pytest.raises(ValueError, match="beyond the held"):
        kernel.read(setup.pages, batch, x[0], x[0], index + 1)


@settings(max_examples=40, deadline=None)
@given(
    policy=POLICIES,
    heads=st.sampled_from([(6, 2), (4, 4), (12, 1)]),
    samples=st.sampled_from([1, 3, 8, 128]),
    fresh=st.sampled_from([1, 40, 128, 300]),
    isa=st.sampled_from(supported_isas()),
    scores=st.tuples(CAPS, st.booleans()),
    seed=st.integers(0, 99),
)
def test_page_mass_is_the_reference(
    policy: str,
    heads: tuple[int, int],
    samples: int,
    fresh: int,
    isa: str,
    scores: tuple[float, bool],
    seed: int,
) -> None:
    computed = [700, 0, 130]
    setup = Setup.make(
        policy, seqs=3, heads=heads[0], kv_heads=heads[1], max_tokens=1100,
        soft_cap=scores[0], sinks=scores[1],
    )  # fmt: skip
    setup.fill(computed, seed)
    batch = setup.batch(computed, [fresh, 5, 64])
    query, key, _ = setup.tokens(fresh + 69, seed + 1)
    blocks = [(0, b, min(128, fresh - b)) for b in range(0, fresh, 128)] + [(2, 0, 64)]
    table = torch.tensor(blocks, dtype=torch.int32)
    kernels = (
        ReferenceKernel(setup.layout, setup.shape),
        CpuKernel(setup.layout, setup.shape, isa=isa),
    )
    expected, got = (k.page_mass(setup.pages, batch, query, key, table, samples) for k in kernels)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-5)
    if not scores[1]:  # sinks have the rest
        torch.testing.assert_close(got[0].sum(-1) + got[1], torch.ones_like(got[1]))


@settings(max_examples=40, deadline=None)
@given(
    policy=POLICIES,
    heads=st.sampled_from([(6, 2), (4, 4), (12, 1)]),
    fresh=st.sampled_from([1, 50, 300]),
    mass=st.booleans(),
    isa=st.sampled_from(supported_isas()),
    seed=st.integers(0, 99),
)
def test_blocks_of_queries_read_their_own_pages(
    policy: str, heads: tuple[int, int], fresh: int, mass: bool, isa: str, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    computed, sizes = [700, 300], [fresh, 70]
    setup = Setup.make(policy, seqs=2, heads=heads[0], kv_heads=heads[1], max_tokens=1100)
    setup.fill(computed, seed)
    batch = setup.batch(computed, sizes)
    lists = [-(-size // 64) for size in sizes]
    stored = [-(-int(n) // 128) for n in batch.stored]
    pages = torch.zeros(sum(lists), heads[1], 6, dtype=torch.int32)
    count = torch.full((sum(lists), heads[1]), -1, dtype=torch.int32)
    for number in range(sum(lists)):
        there = stored[number >= lists[0]]
        for head in range(heads[1]):
            chosen = int(torch.randint(-1, there + 1, (), generator=rng))
            count[number, head] = chosen
            if chosen > 0:
                order = torch.randperm(there, generator=rng)[:chosen].sort().values
                pages[number, head, :chosen] = order.int()
    first = torch.tensor([0, lists[0]], dtype=torch.int32)
    reads = Reads(pages, count, first, 64)
    masses = [mass_of(setup, batch, [0, 3], [0, 0]) if mass else None for _ in range(2)]
    outputs = _attend_both(setup, batch, isa, each=[{"reads": reads, "mass": m} for m in masses])
    torch.testing.assert_close(*outputs, rtol=2e-2, atol=2e-2)
    if mass:
        torch.testing.assert_close(*(m.out for m in masses if m), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("isa", supported_isas())
@pytest.mark.parametrize("policy", CODECS)
def test_heads_may_own_places_of_other_heads_and_rows(policy: str, isa: str) -> None:
    """A slot map says where a head's bytes are; every call goes through it."""
    setup = Setup.make(policy, max_tokens=640)
    computed, fresh = [300, 513], [1, 40]
    setup.fill(computed)
    seqs, row = setup.block_table.shape
    rng = torch.Generator().manual_seed(0)
    slots = torch.stack([torch.randperm(row * 2, generator=rng).view(2, row) for _ in range(seqs)])
    moved = setup.pages.clone()
    for seq, head, i in np.ndindex(seqs, 2, row):
        there = int(slots[seq, head, i])
        page, target = setup.block_table[seq, i], setup.block_table[seq, there // 2]
        moved[target, there % 2] = setup.pages[page, head]
    batch = setup.batch(computed, fresh)
    mapped = replace(batch, slots=slots.int())
    query, key, value = setup.tokens(sum(fresh), seed=9)
    results = []
    for kernel in (ReferenceKernel(setup.layout, setup.shape),
                   CpuKernel(setup.layout, setup.shape, isa=isa)):  # fmt: skip
        for at, pages in ((batch, setup.pages.clone()), (mapped, moved.clone())):
            output = torch.zeros_like(query)
            mass = mass_of(setup, at, [0, 0], [0, 0])
            kernel.attend(pages, at, query, key, value, output, mass)
            kernel.append(pages, at, key, value)
            start = torch.tensor([0, 100, 300], dtype=torch.int32)
            index = torch.cat([torch.arange(100), torch.arange(200)]).int().expand(2, -1)
            after = at.after_append()
            held = kernel.read(pages, after, key, value, index.contiguous(), start)
            results.append((output, mass.out, *held))
        for plain, other in zip(*results[-2:], strict=True):
            assert torch.equal(plain, other)
