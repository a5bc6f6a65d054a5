"""Attention of the Triton kernels against the reference, and what ``append`` leaves in the pages.

Run by ``test_triton`` in Triton's interpreter, and by ``make gpu-check`` on a GPU.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cache_policies.errors import PolicyError
from tests.kernels.cases import LENGTHS, POLICIES
from tests.kernels.harness import TOLERANCE, Setup
from tests.kernels.triton.setup import ALL, Both, examples, make, on_device, there

# One codec of each kind of page daily, the whole list nightly.
DAILY = ("raw", "int8", "flexgen-4bit", "kivi-4bit", "kivi-2bit", "kivi(k_bits=2,v_bits=4)",
         "bf16", "kivi-4bit(group=16,residual=64)", "rotated(k_bits=4,v_bits=3)")  # fmt: skip
SEQUENCES = st.lists(
    st.tuples(LENGTHS, st.sampled_from((1, 1, 1, 2, 5, 33, 90))),
    min_size=1,
    max_size=4 if ALL else 2,
)


def compare(setup: Setup, sequences: list[tuple[int, int]], **options: object) -> None:
    computed, fresh = [c for c, _ in sequences], [f for _, f in sequences]
    setup.fill(computed)
    batch, tokens = setup.batch(computed, fresh), setup.tokens(sum(fresh), seed=7)
    both = Both(setup, **options)
    expected, got = both.attend(batch, tokens, {}, {})
    assert expected.isfinite().all(), "the test itself read what was never written"
    tolerance = TOLERANCE[setup.layout.model_dtype]
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)
    expected, got = both.append(batch, *tokens[1:])
    assert torch.equal(got, expected)


@pytest.mark.parametrize("policy", POLICIES if ALL else DAILY)
@examples(1, 15)
@given(
    sequences=SEQUENCES,
    heads=st.sampled_from(((1, 1), (3, 3), (6, 2), (4, 1), (9, 3), (7, 1), (24, 1))),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    seed=st.integers(0, 9),
)
def test_equals_reference(
    policy: str,
    sequences: list[tuple[int, int]],
    heads: tuple[int, int],
    dtype: torch.dtype,
    seed: int,
) -> None:
    setup = make(
        policy, seqs=len(sequences), heads=heads[0], kv_heads=heads[1], dtype=dtype, seed=seed
    )
    compare(setup, sequences)


@pytest.mark.parametrize("policy", DAILY)
def test_decode_beside_prefill(policy: str) -> None:
    """Around the edge of a page; one request decodes, whose store is split, one is in prefill."""
    setup = make(policy, heads=2, kv_heads=1, dtype=torch.float16)
    compare(setup, [(257, 1), (127, 6)], splits=2)


@pytest.mark.parametrize(("soft_cap", "sinks"), [(0.5, False), (5.0, True), (0.0, True)])
@pytest.mark.parametrize("policy", POLICIES if ALL else ("raw", "int8", "kivi-4bit"))
def test_soft_caps_and_learned_sinks(policy: str, soft_cap: float, *, sinks: bool) -> None:
    """In a split store and in a whole one; the caps bend all scores and few."""
    setup = make(policy, heads=4, kv_heads=2, soft_cap=soft_cap)
    learned = torch.tensor([3.0, 6.0, 4.0, 5.0]) if sinks else None
    setup.shape = replace(setup.shape, sinks=learned)
    compare(setup, [(257, 1), (127, 6)], splits=2)
    plain = replace(setup, shape=replace(setup.shape, soft_cap=0.0, sinks=None))
    batch, tokens = setup.batch([257, 127], [1, 6]), setup.tokens(7, seed=7)
    both = [Both(x).reference for x in (setup, plain)]
    outputs = [torch.empty_like(tokens[0]) for _ in both]
    for kernel, output in zip(both, outputs, strict=True):
        kernel.attend(setup.pages, batch, *tokens, output)
    change = (outputs[0] - outputs[1]).abs().amax((1, 2))
    assert (change > 2 * TOLERANCE[torch.float32]).all(), "too little to be seen"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy", POLICIES if ALL else ("fp16", "kivi-4bit"))
def test_model_types(policy: str, dtype: torch.dtype) -> None:
    compare(make(policy, seqs=1, heads=3, kv_heads=1, dtype=dtype), [(150, 1)])


SIZES = [
    (head_size, page_tokens, policy)
    for head_size in (64, 80, 96, 128, 256)
    for page_tokens in (32, 64, 128, 256)
    for policy in ("raw", "fp16", "int8", "flexgen-4bit(group=16)",
                   "kivi-4bit(group=16,residual=32)", "kivi-2bit(group=32,residual=32)",
                   "rotated-3bit", "rotated-4bit")
]  # fmt: skip
FEW_SIZES = [
    (80, 128, "flexgen-4bit(group=16)"), (96, 64, "kivi-2bit(group=32,residual=32)"),
    (128, 128, "kivi-4bit(group=128)"), (80, 32, "int8"), (256, 256, "fp16"),
    (256, 32, "kivi-4bit(group=16,residual=32)"), (80, 32, "rotated(k_bits=3,v_bits=2)"),
    (96, 128, "rotated-4bit"),
]  # fmt: skip


@pytest.mark.parametrize(("head_size", "page_tokens", "policy"), SIZES if ALL else FEW_SIZES)
def test_head_and_page_sizes(head_size: int, page_tokens: int, policy: str) -> None:
    try:
        setup = make(policy, heads=2, kv_heads=1, head_size=head_size, page_tokens=page_tokens)
    except PolicyError as error:
        assert "does not divide head size 80" in str(error)  # noqa: PT017
        pytest.skip("this group does not divide this head size, and is refused")
    compare(setup, [(300, 1), (97, 40)] if ALL else [(170, 1), (33, 3)])


@pytest.mark.parametrize("splits", [1, 3, 19] if ALL else [3, 19])
@pytest.mark.parametrize("policy", POLICIES if ALL else ("fp16", "kivi-2bit"))
def test_splits_do_not_change_the_result(policy: str, splits: int) -> None:
    """Nor does their number, beyond those that are joined at a time."""
    setup = make(policy, seqs=1, heads=3, kv_heads=1, max_tokens=1400)
    compare(setup, [(1300, 1)], splits=splits)


def test_pages_with_gaps_between_them_are_read_in_place() -> None:
    """As where other layers' pages lie between: neither stride is that of a packed tensor."""
    setup = make("kivi-4bit", heads=2, kv_heads=2)
    pages = setup.pages
    wide = torch.zeros(pages.shape[0], 3, pages.shape[1], pages.shape[2], dtype=torch.uint8)
    wide[:, 1] = pages
    setup.pages = wide[:, 1]
    assert not setup.pages.is_contiguous()
    setup.fill([200, 0])
    batch, tokens = setup.batch([200, 0], [1, 3]), setup.tokens(4, seed=7)
    both = Both(setup)
    whole = wide.to(both.pages_there.device)
    both.pages_there = whole[:, 1]
    assert both.pages_there.data_ptr() != both.pages_there.contiguous().data_ptr()
    both.pages = setup.pages
    expected, got = both.attend(batch, tokens, {}, {})
    torch.testing.assert_close(got, expected, atol=2e-2, rtol=0)
    assert torch.equal(*both.append(batch, *tokens[1:]))
    others = torch.tensor([0, 2])
    assert not whole.cpu()[:, others].any(), "bytes of other layers were written"


def test_the_stride_of_a_lone_kv_head_may_be_any() -> None:
    """What torch makes of it depends on how a tensor of one head was made."""
    setup = make("fp16", seqs=1, heads=2, kv_heads=1)
    setup.fill([40])
    batch, (query, *kv) = setup.batch([40], [3]), setup.tokens(3, seed=7)
    key, value = (x.as_strided(x.shape, (x.stride(0), 7, 1)) for x in kv)
    both, output = Both(setup), torch.empty_like(query)
    both.reference.attend(both.pages, batch, query, *kv, output)
    there_ = [x.to(both.pages_there.device) for x in (query, key, value)]
    assert there_[1].stride(1) == 7
    got = torch.empty_like(there_[0])
    both.triton.attend(both.pages_there, on_device(batch), *there_, got)
    torch.testing.assert_close(got.cpu(), output, atol=TOLERANCE[torch.float32], rtol=0)
    two = make("fp16", seqs=1, heads=2, kv_heads=2)
    apart = torch.zeros(3, 2, 128)[:, :, :64]
    with pytest.raises(ValueError, match="key: heads not contiguous"):
        Both(two).triton.append(two.pages, two.batch([0], [3]), apart, apart)


def test_wrong_arguments_are_refused_before_an_address_is_used() -> None:
    setup = make("fp16")
    both, batch = Both(setup), setup.batch([0, 0], [1, 1])
    query, key, value = setup.tokens(2, seed=0)
    with pytest.raises(ValueError, match=r"query must be torch\.float32"):
        both.triton.attend(setup.pages, batch, query.half(), key, value, query)
    with pytest.raises(ValueError, match="key has shape"):
        both.triton.append(setup.pages, batch, key[:, :1], value)
    with pytest.raises(ValueError, match="page shape"):
        both.triton.append(setup.pages[:, :1], batch, key, value)


def test_pages_packed_for_another_kernel_are_refused() -> None:
    setup = Setup.make("kivi-4bit")
    with pytest.raises(PolicyError, match="packed as planes only"):
        Both(setup)


@pytest.mark.parametrize("policy", POLICIES if ALL else ("flexgen-4bit", "rotated-4bit"))
def test_a_key_offset_is_taken_before_keys_are_stored_and_added_to_what_is_read(
    policy: str,
) -> None:
    setup = make(policy, heads=4, kv_heads=2)
    bias = torch.zeros(2, 64)
    bias[:, 7], bias[1, 40] = 64.0, -32.0
    setup.shape = replace(setup.shape, key_offset=bias)
    setup.fill([200, 40])
    batch, (query, key, value) = setup.batch([200, 40], [1, 5]), setup.tokens(6, seed=7)
    both, tokens = Both(setup), (query, key + bias, value)
    expected, got = both.attend(batch, tokens, {}, {})
    torch.testing.assert_close(got, expected, atol=TOLERANCE[torch.float32], rtol=0)
    assert torch.equal(*both.append(batch, *tokens[1:]))
    after, start = batch.after_append(), torch.tensor([0, 4, 8], dtype=torch.int32)
    index = torch.tensor([[5, -1, 200, 41, 0, -1, 44, 40]], dtype=torch.int32).expand(2, -1)
    index = index.contiguous()
    held = both.reference.read(both.pages, after, *tokens[1:], index, start)
    found = both.triton.read(both.pages_there, on_device(after), *there(*tokens[1:], index), start)
    torch.testing.assert_close([x.cpu() for x in found], list(held), rtol=1e-5, atol=1e-5)
    assert not found[0][:, 1].any()
