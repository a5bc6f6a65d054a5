"""The C++ kernels against the reference: attention within tolerance, pages byte for byte."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache_policies.errors import PolicyError
from cache_policies.kernels import kernel_class
from cache_policies.kernels.contract import Shape
from cache_policies.kernels.cpu import CpuKernel, supported_isas
from cache_policies.kernels.reference import ReferenceKernel
from cache_policies.pages.layout import PageLayout
from cache_policies.policy import parse
from tests.kernels.cases import LENGTHS, POLICIES
from tests.kernels.harness import CAPS, EXACT, TOLERANCE, WIDER, Setup

SEQUENCES = st.lists(
    st.tuples(LENGTHS, st.sampled_from((1, 1, 1, 2, 5, 33, 90))), min_size=1, max_size=4
)
quick = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


def _compare(
    setup: Setup, sequences: list[tuple[int, int]], tolerance: float, **options: object
) -> None:
    computed, fresh = [c for c, _ in sequences], [f for _, f in sequences]
    setup.fill(computed)
    batch = setup.batch(computed, fresh)
    query, key, value = setup.tokens(sum(fresh), seed=7)
    expected, got = torch.full_like(query, float("nan")), torch.full_like(query, float("nan"))
    pages = setup.pages.clone(), setup.pages.clone()
    reference = ReferenceKernel(setup.layout, setup.shape)
    kernel = CpuKernel(setup.layout, setup.shape, **options)  # type: ignore[arg-type]
    reference.attend(pages[0], batch, query, key, value, expected)
    kernel.attend(pages[1], batch, query, key, value, got)
    assert expected.isfinite().all(), "the test itself read what was never written"
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)
    reference.append(pages[0], batch, key, value)
    kernel.append(pages[1], batch, key, value)
    assert torch.equal(*pages)


@pytest.mark.parametrize("isa", supported_isas())
@pytest.mark.parametrize("policy", POLICIES)
@quick
@given(
    sequences=SEQUENCES,
    heads=st.sampled_from(((1, 1), (3, 3), (6, 2), (4, 1), (9, 3), (7, 1))),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    soft_cap=CAPS,
    sinks=st.booleans(),
    seed=st.integers(0, 9),
)
def test_equals_reference(
    policy: str,
    isa: str,
    sequences: list[tuple[int, int]],
    heads: tuple[int, int],
    dtype: torch.dtype,
    soft_cap: float,
    sinks: bool,
    seed: int,
) -> None:
    setup = Setup.make(
        policy, seqs=len(sequences), heads=heads[0], kv_heads=heads[1], dtype=dtype, seed=seed,
        soft_cap=soft_cap, sinks=sinks,
    )  # fmt: skip
    _compare(setup, sequences, max(TOLERANCE[dtype], WIDER.get(policy, 0.0)), isa=isa)


@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("page_tokens", [32, 64, 128, 256, 512])
@pytest.mark.parametrize(
    "policy",
    ["raw", "fp16", "int8", "flexgen-4bit(group=16)", "kivi-4bit(group=16,residual=32)",
     "kivi-2bit(group=32,residual=32)", "rotated-4bit", "rotated-3bit"],
)  # fmt: skip
def test_head_and_page_sizes(policy: str, head_size: int, page_tokens: int) -> None:
    try:
        setup = Setup.make(policy, head_size=head_size, page_tokens=page_tokens)
    except PolicyError as error:
        assert "does not divide head size 80" in str(error)  # noqa: PT017
        pytest.skip("this group does not divide this head size, and is refused")
    limit = max(TOLERANCE[torch.float32], WIDER.get(policy, 0.0))
    _compare(setup, [(300, 1), (97, 40)], limit)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_and_splits_do_not_change_the_result(policy: str, threads: int) -> None:
    """One long sequence is split over its pages, and joined."""
    setup = Setup.make(policy, seqs=1, heads=3, kv_heads=1, max_tokens=2000, soft_cap=2, sinks=True)
    _compare(setup, [(1900, 1)], TOLERANCE[torch.float32], num_threads=threads)


@pytest.mark.parametrize("policy", POLICIES)
def test_without_integer_dots_only_summation_order_differs(policy: str) -> None:
    setup = Setup.make(policy)
    _compare(setup, [(300, 1), (129, 70)], EXACT[torch.float32], rounding=False)


@pytest.mark.parametrize("isa", supported_isas())
@pytest.mark.parametrize("fresh", [1, 40])
@pytest.mark.parametrize(
    "policy",
    ["int8", "flexgen-4bit", "kivi-4bit", "kivi-2bit", "rotated-4bit", "rotated-3bit"],
)
def test_rounding_stays_under_a_tenth_of_the_codec(policy: str, fresh: int, isa: str) -> None:
    """Measured on the output: what decode in integers, and prefill in bfloat16 where the CPU has
    it, add beside what the codec loses."""
    setup = Setup.make(policy, seqs=1, heads=9, kv_heads=3, max_tokens=4096)
    kernel = ReferenceKernel(setup.layout, setup.shape)
    _, key, value = setup.tokens(4000, seed=1)
    kernel.append(setup.pages, setup.batch([0], [4000]), key, value)
    query, fresh_key, fresh_value = setup.tokens(fresh, seed=2)
    batch = setup.batch([4000], [fresh])
    results = []
    for rounding in (False, True):
        output = torch.empty_like(query)
        CpuKernel(setup.layout, setup.shape, isa=isa, rounding=rounding).attend(
            setup.pages, batch, query, fresh_key, fresh_value, output
        )
        results.append(output)
    exact = Setup.make("raw", seqs=1, heads=9, kv_heads=3, max_tokens=4096)
    raw = ReferenceKernel(exact.layout, exact.shape)
    raw.append(exact.pages, exact.batch([0], [4000]), key, value)
    truth = torch.empty_like(query)
    raw.attend(exact.pages, exact.batch([4000], [fresh]), query, fresh_key, fresh_value, truth)
    codec = (results[0] - truth).norm()
    added = (results[1] - results[0]).norm()
    assert added < 0.1 * codec
    bfloat16 = isa == "amx" or (isa == "avx512bf16" and policy != "int8")
    assert (added > 0) == (bfloat16 or (fresh == 1 and isa != "portable"))


@pytest.mark.parametrize("isa", supported_isas())
@pytest.mark.parametrize("head_size", [64, 80, 256])
@pytest.mark.parametrize("policy", ["raw", "fp16", "int8", "kivi(k_bits=8,v_bits=8)"])
def test_prefill_over_many_bits_is_as_exact_as_floats(
    policy: str, head_size: int, isa: str
) -> None:
    """Also where a float is the sum of two bfloat16 numbers; keys far from zero included."""
    if policy.startswith("kivi") and head_size == 80:
        policy = "kivi(k_bits=8,v_bits=8,group=16)"
    setup = Setup.make(policy, head_size=head_size, heads=3, kv_heads=1)
    setup.fill([300, 129])
    batch = setup.batch([300, 129], [33, 70])
    query, key, value = setup.tokens(103, seed=5)
    key += 10 * torch.arange(head_size) % 7
    outputs = [torch.empty_like(query) for _ in range(2)]
    for kernel, output in zip(
        (CpuKernel(setup.layout, setup.shape, isa=isa), ReferenceKernel(setup.layout, setup.shape)),
        outputs,
        strict=True,
    ):
        kernel.attend(setup.pages, batch, query, key, value, output)
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("isa", supported_isas())
@pytest.mark.parametrize("factor", [3.0, 30.0, 300.0])
def test_groups_of_unlike_scales_share_a_page(isa: str, factor: float) -> None:
    """A query rounded in one unit for all groups of a page would spoil the scores of small keys.

    The large ones get no attention, by their first channel, so that nothing else is in the output.
    """
    setup = Setup.make("kivi-4bit", seqs=1, heads=9, kv_heads=3, max_tokens=1100)
    query, key, value = setup.tokens(1024, seed=1)
    large = torch.arange(1024) % 128 < 32  # the first group of every page
    key[large] *= factor
    key[large, :, 0], query[:, :, 0] = -3e4, 1.0
    kernel = ReferenceKernel(setup.layout, setup.shape)
    kernel.append(setup.pages, setup.batch([0], [1024]), key, value)
    batch, outputs = setup.batch([1024], [1]), []
    for rounding in (False, True):
        output = torch.empty_like(query[:1])
        CpuKernel(setup.layout, setup.shape, isa=isa, rounding=rounding).attend(
            setup.pages, batch, query[:1], key[-1:], value[-1:], output
        )
        outputs.append(output)
    raw = Setup.make("raw", seqs=1, heads=9, kv_heads=3, max_tokens=1100)
    exact = ReferenceKernel(raw.layout, raw.shape)
    exact.append(raw.pages, raw.batch([0], [1024]), key, value)
    truth = torch.empty_like(outputs[0])
    exact.attend(raw.pages, raw.batch([1024], [1]), query[:1], key[-1:], value[-1:], truth)
    assert (outputs[1] - outputs[0]).norm() < 0.1 * (outputs[0] - truth).norm()


def test_queries_with_outlier_channels_keep_the_rounding_bound() -> None:
    """Real queries have a few large channels; the shared rounding step must still be fine."""
    setup = Setup.make("kivi-4bit", seqs=1, heads=3, kv_heads=1, max_tokens=1100)
    setup.fill([1024])
    query, key, value = setup.tokens(1, seed=3)
    query[..., :2] *= 20
    batch, outputs = setup.batch([1024], [1]), []
    for rounding in (False, True):
        outputs.append(torch.empty_like(query))
        CpuKernel(setup.layout, setup.shape, rounding=rounding).attend(
            setup.pages, batch, query, key, value, outputs[-1]
        )
    assert (outputs[0] - outputs[1]).norm() < 0.01 * outputs[0].norm()


def test_wrong_arguments_are_refused_before_an_address_is_used() -> None:
    setup = Setup.make("fp16")
    kernel = CpuKernel(setup.layout, setup.shape)
    batch = setup.batch([0, 0], [1, 1])
    query, key, value = setup.tokens(2, seed=0)
    with pytest.raises(ValueError, match=r"query must be torch\.float32"):
        kernel.attend(setup.pages, batch, query.half(), key, value, query)
    with pytest.raises(ValueError, match="key has shape"):
        kernel.append(setup.pages, batch, key[:, :1], value)
    with pytest.raises(ValueError, match="page shape"):
        kernel.append(setup.pages[:, :1], batch, key, value)


@pytest.mark.parametrize("kernel", [ReferenceKernel, CpuKernel])
def test_a_large_sink_takes_all_of_the_softmax_and_a_small_one_nothing(kernel: Any) -> None:
    setup = Setup.make("raw", seqs=1, heads=2, kv_heads=1)
    setup.fill([200])
    query, key, value = setup.tokens(1, seed=2)
    outputs = []
    for sinks in (None, torch.tensor([-300.0, 300.0])):
        output = torch.empty_like(query)
        one = kernel(setup.layout, replace(setup.shape, sinks=sinks))
        one.attend(setup.pages, setup.batch([200], [1]), query, key, value, output)
        outputs.append(output)
    torch.testing.assert_close(outputs[1][0, 0], outputs[0][0, 0])
    assert outputs[1][0, 1].abs().max() == 0


def test_too_many_query_heads_of_a_kv_head_are_refused() -> None:
    layout = PageLayout(parse("fp16").codec, 64, 128, torch.float32)
    with pytest.raises(PolicyError, match="more than 192 query heads"):
        CpuKernel(layout, Shape(193, 1, 0.125))


def test_the_kernel_can_be_chosen() -> None:
    assert kernel_class("cpu") is CpuKernel
    assert kernel_class("auto") is CpuKernel
    assert kernel_class("reference") is ReferenceKernel
    with pytest.raises(PolicyError, match="allowed: auto, cpu, triton, reference"):
        kernel_class("cuda")


def test_a_failed_load_falls_back_once_with_a_warning_or_fails_if_forced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernel_class.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "cache_policies.kernels.cpu", None)
    assert kernel_class("auto") is ReferenceKernel
    assert kernel_class("auto") is ReferenceKernel
    assert sum("cannot be loaded" in r.message for r in caplog.records) == 1
    with pytest.raises(PolicyError, match="cache_kernel=cpu cannot be loaded"):
        kernel_class("cpu")
    kernel_class.cache_clear()
