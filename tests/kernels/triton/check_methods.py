"""What evicting and retrieving methods need of the Triton kernels, against the reference.

Run by ``test_triton`` in Triton's interpreter, and by ``make gpu-check`` on a GPU.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cache_policies.kernels.contract import Mass, Reads
from cache_policies.pages.codecs import CODECS
from tests.kernels.cases import HELD, mass_of
from tests.kernels.triton.setup import ALL, DEVICE, Both, examples, make, on_device, there

PAGES = ["int8", "kivi-4bit"]
NAMES = list(CODECS) if ALL else ["fp16", "int8", "flexgen-4bit", "kivi-4bit", "rotated-3bit"]
CLOSE = {"rtol": 5e-3, "atol": 5e-3}


def _there(mass: Mass) -> Mass:
    return replace(mass, out=mass.out.to(DEVICE))


@pytest.mark.parametrize("policy", NAMES)
@examples(1, 10)
@given(computed=st.lists(HELD, min_size=2, max_size=2), seed=st.integers(0, 99))
def test_mass_equals_the_sums_of_the_softmax(policy: str, computed: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    setup = make(policy, heads=6 if ALL else 2, kv_heads=2 if ALL else 1, max_tokens=900)
    setup.fill(computed)
    fresh = [int(rng.choice([1, 7, 129, 200] if ALL else [1, 7, 40])) for _ in computed]
    batch = setup.batch(computed, fresh)
    first_query = [int(rng.integers(0, fresh[0])), -1 if seed % 2 else 0]
    first_token = [0, int(rng.integers(0, 300))]
    masses = [mass_of(setup, batch, first_query, first_token) for _ in range(2)]
    masses[1] = _there(masses[1])
    both = Both(setup)
    tokens = setup.tokens(sum(fresh), seed=9)
    outputs = both.attend(batch, tokens, {"mass": masses[0]}, {"mass": masses[1]})
    torch.testing.assert_close(*outputs, **CLOSE)
    torch.testing.assert_close(masses[1].out.cpu(), masses[0].out, rtol=1e-2, atol=2e-3)
    held = int(batch.stored[0] + batch.ring[0]) + fresh[0]
    counted = masses[1].out[:, int(masses[1].place[0]) :][:, :held] - 0.5
    queries = (fresh[0] - first_query[0]) * setup.shape.num_heads // setup.shape.num_kv_heads
    total = torch.full((setup.shape.num_kv_heads,), float(queries))
    torch.testing.assert_close(counted.sum(1).cpu(), total, rtol=2e-3, atol=0)


@pytest.mark.parametrize("policy", NAMES if ALL else PAGES)
def test_mass_under_a_soft_cap_and_beside_learned_sinks(policy: str) -> None:
    setup = make(policy, heads=4, kv_heads=2, max_tokens=400, soft_cap=0.5, sinks=True)
    setup.fill([200, 130])
    batch, both = setup.batch([200, 130], [1, 20]), Both(setup)
    masses = [mass_of(setup, batch, [0, 0], [0, 0]) for _ in range(2)]
    masses[1] = _there(masses[1])
    outputs = both.attend(batch, setup.tokens(21, seed=9), {"mass": masses[0]}, {"mass": masses[1]})
    torch.testing.assert_close(*outputs, **CLOSE)
    torch.testing.assert_close(masses[1].out.cpu(), masses[0].out, rtol=1e-2, atol=2e-3)
    counted = masses[1].out[:, int(masses[1].place[1]) :][:, :150] - 0.5
    assert (counted.sum(1) < 20 * 2).all()  # the sinks have the rest


@pytest.mark.parametrize("page_tokens", [64, 128] if ALL else [64])
@pytest.mark.parametrize("policy", NAMES if ALL else PAGES)
@examples(1, 6)
@given(seed=st.integers(0, 99))
def test_only_chosen_pages_are_read_and_counted(policy: str, page_tokens: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    residual = "(residual=64)" if policy.startswith("kivi") and page_tokens == 64 else ""
    setup = make(
        policy + residual,
        heads=4, kv_heads=2, max_tokens=900, page_tokens=page_tokens,
    )  # fmt: skip
    computed = [5 * page_tokens, 2 * page_tokens + 40]
    setup.fill(computed)
    fresh = [int(rng.choice([1, 20])), 1]
    batch = setup.batch(computed, fresh)
    pages = torch.zeros(2, 2, 5, dtype=torch.int32)
    for head in range(2):
        pages[0, head, :3] = torch.tensor(sorted(rng.choice(5, 3, replace=False)))
    first = torch.arange(2, dtype=torch.int32)
    reads = Reads(pages, torch.tensor([[3, 3], [-1, -1]], dtype=torch.int32), first)
    masses = [mass_of(setup, batch, [0, 0], [0, 0]) for _ in range(2)]
    masses[1] = _there(masses[1])
    both, tokens = Both(setup), setup.tokens(sum(fresh), seed=9)
    chosen = both.attend(batch, tokens, *({"reads": reads, "mass": m} for m in masses))
    torch.testing.assert_close(*chosen, **CLOSE)
    torch.testing.assert_close(masses[1].out.cpu(), masses[0].out, rtol=1e-2, atol=2e-3)
    everything = both.attend(batch, tokens, {}, {})
    assert not torch.allclose(everything[1][0], chosen[1][0], atol=1e-3)
    torch.testing.assert_close(everything[1][-1], chosen[1][-1], **CLOSE)


@pytest.mark.parametrize("policy", NAMES)
@examples(2, 15)
@given(held=HELD, fresh=st.sampled_from([0, 1, 5]), seed=st.integers(0, 99))
def test_tokens_are_read_alike(policy: str, held: int, fresh: int, seed: int) -> None:
    setup = make(policy, seqs=1, max_tokens=700)
    setup.fill([held])
    _, key, value = setup.tokens(fresh, seed=4)
    stored = held - int(setup.batch([held], [1]).ring[0])
    batch = setup.batch([held], [1]).one(
        0, held=held, stored=stored, store_row=setup.layout.ring_pages, fresh=range(fresh)
    )
    rng = torch.Generator().manual_seed(seed)
    total = held + fresh
    index = torch.randint(total, (2, min(total, 50)), generator=rng).int() if total else None
    both = Both(setup)
    for chosen in (None, index):
        expected = both.reference.read(both.pages, batch, key, value, chosen)
        at = None if chosen is None else chosen.to(DEVICE)
        got = both.triton.read(both.pages_there, on_device(batch), *there(key, value), at)
        torch.testing.assert_close([x.cpu() for x in got], list(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy", NAMES)
@examples(2, 15)
@given(held=HELD, seed=st.integers(0, 99))
def test_what_is_written_is_read_back(policy: str, held: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    data = torch.randn(2, 2, held, 64, generator=rng)
    setup = make(policy, seqs=1, max_tokens=1400)
    base = setup.layout.ring_pages + 3  # some pages behind those of the prompt
    stored = int(setup.batch([held], [1]).stored[0])
    batch = setup.batch([held], [1]).one(0, held=held, stored=stored, store_row=base)
    index = torch.arange(held, dtype=torch.int32).expand(2, -1).contiguous()
    both, empty = Both(setup), torch.empty(0, 2, 64)
    both.reference.write(both.pages, batch, index, *data.clone())
    both.triton.write(both.pages_there, on_device(batch), *there(index, *data))
    expected = both.reference.read(both.pages, batch, empty, empty)
    got = both.triton.read(both.pages_there, on_device(batch), *there(empty, empty))
    torch.testing.assert_close([x.cpu() for x in got], list(expected), rtol=1e-5, atol=1e-5)
    error = (got[0].cpu() - data[0]).abs().max() if held else torch.zeros(())
    assert error < {"raw": 1e-6, "fp16": 3e-3, "bf16": 3e-2, "int8": 3e-2}.get(policy, 1.5)


@pytest.mark.parametrize("policy", ["raw", "fp16", "int8", "flexgen-4bit"])
def test_single_tokens_replace_others_and_no_more(policy: str) -> None:
    setup = make(policy, seqs=1, max_tokens=400)
    setup.fill([300])
    batch = on_device(setup.batch([300], [1]).one(0, held=300, stored=300, store_row=0))
    both = Both(setup)
    (empty,) = there(torch.empty(0, 2, 64))
    before = both.triton.read(both.pages_there, batch, empty, empty)[0].cpu()
    index = torch.tensor([[5, 128, -1], [299, 0, 7]], dtype=torch.int32)
    new = torch.randn(2, 2, 3, 64, generator=torch.Generator().manual_seed(1))
    both.triton.write(both.pages_there, batch, *there(index, *new))
    after = both.triton.read(both.pages_there, batch, empty, empty)[0].cpu()
    changed = (after - before).abs().amax(-1) > 0
    assert changed[0].nonzero().flatten().tolist() == [5, 128]
    assert changed[1].nonzero().flatten().tolist() == [0, 7, 299]
    torch.testing.assert_close(after[1, 299], new[0, 1, 0], rtol=0.05, atol=0.3)


@pytest.mark.parametrize("policy", NAMES if ALL else ["int8", "kivi-4bit"])
def test_several_requests_are_read_and_written_together(policy: str) -> None:
    """As a step does whose requests are cut together; numbers below 0 are read as zeros."""
    setup = make(policy, seqs=2, max_tokens=400)
    setup.fill([200, 40])
    batch, both = setup.batch([200, 40], [3, 2]), Both(setup)
    batch = replace(batch, appended=torch.zeros(2, dtype=torch.int32))
    tokens = setup.tokens(5, seed=4)[1:]
    index = torch.tensor([[5, -1, 202, 41, 0], [201, 7, 130, -1, 39]], dtype=torch.int32)
    start = torch.tensor([0, 3, 5], dtype=torch.int32)
    expected = both.reference.read(both.pages, batch, *tokens, index, start)
    moved = on_device(batch)
    got = both.triton.read(both.pages_there, moved, *there(*tokens, index), start)
    torch.testing.assert_close([x.cpu() for x in got], list(expected), rtol=1e-5, atol=1e-5)
    assert not got[0][0, 1].any()
    batch = setup.batch([200, 40], [1, 1])
    index = torch.cat([torch.arange(n, dtype=torch.int32) for n in (200, 40)]).expand(2, -1)
    start = torch.tensor([0, 200, 240], dtype=torch.int32)
    data = torch.randn(2, 2, 240, 64, generator=torch.Generator().manual_seed(2))
    both.reference.write(both.pages, batch, index.contiguous(), *data.clone(), start)
    both.triton.write(both.pages_there, on_device(batch), *there(index.contiguous(), *data), start)
    assert torch.equal(both.pages_there.cpu(), both.pages)


@pytest.mark.parametrize("policy", NAMES if ALL else ["int8", "kivi-4bit"])
@pytest.mark.parametrize(("samples", "sinks"), [(3, False), (8, True)])
def test_shares_of_pages_of_a_few_queries(policy: str, samples: int, *, sinks: bool) -> None:
    setup = make(policy, seqs=2, heads=4, kv_heads=2, max_tokens=500, soft_cap=5.0, sinks=sinks)
    setup.fill([300, 0])
    batch, both = setup.batch([300, 0], [70, 40]), Both(setup)
    query, key, _ = setup.tokens(110, seed=4)
    blocks = torch.tensor([[0, 0, 64], [0, 64, 2], [1, 0, 40]], dtype=torch.int32)
    expected = both.reference.page_mass(both.pages, batch, query, key, blocks, samples)
    got = both.triton.page_mass(
        both.pages_there, on_device(batch), *there(query, key), blocks, samples
    )
    torch.testing.assert_close([x.cpu() for x in got], list(expected), rtol=5e-3, atol=2e-3)
    assert expected[0][2].sum() == 0, "a request without stored tokens"


@pytest.mark.parametrize("policy", NAMES if ALL else ["int8", "kivi-4bit"])
@examples(1, 8)
@given(seed=st.integers(0, 99))
def test_blocks_of_queries_read_their_own_pages(policy: str, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    setup = make(policy, seqs=2, heads=2, kv_heads=2, max_tokens=500)
    setup.fill([300, 130])
    batch = setup.batch([300, 130], [70, 1])
    stored = -(-int(batch.stored[0]) // 128)
    pages = torch.zeros(3, 2, 3, dtype=torch.int32)
    count = torch.tensor([[1, stored], [-1, 1], [-1, 0]], dtype=torch.int32)
    for number, head in ((0, 0), (0, 1), (1, 1)):
        many = int(count[number, head])
        chosen = torch.randperm(stored, generator=rng)[:many].sort().values
        pages[number, head, :many] = chosen.int()
    reads = Reads(pages, count, torch.tensor([0, 2], dtype=torch.int32), 64)
    masses = [mass_of(setup, batch, [0, 0], [0, 0]) for _ in range(2)]
    masses[1] = _there(masses[1])
    both, tokens = Both(setup), setup.tokens(71, seed=9)
    outputs = both.attend(batch, tokens, *({"reads": reads, "mass": m} for m in masses))
    torch.testing.assert_close(*outputs, **CLOSE)
    torch.testing.assert_close(masses[1].out.cpu(), masses[0].out, rtol=1e-2, atol=2e-3)
    everything = both.attend(batch, tokens, {}, {})
    assert not torch.allclose(everything[1][:64], outputs[1][:64], atol=1e-3)


def test_lists_whose_queries_do_not_fill_a_block_of_rows_are_refused() -> None:
    setup = make("fp16", heads=2, kv_heads=2)
    reads = Reads(torch.zeros(2, 2, 1).int(), torch.zeros(2, 2).int(), torch.zeros(2).int(), 20)
    tokens = setup.tokens(2, 0)
    with pytest.raises(ValueError, match="20 queries a list"):
        Both(setup).attend(setup.batch([0, 0], [1, 1]), tokens, {}, {"reads": reads})
