"""Sparse prefill: what is chosen, what is exact, what is counted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_policies.errors import PolicyError
from cache_policies.kernels.cpu import CpuKernel
from cache_policies.kernels.reference import ReferenceKernel
from cache_policies.policy import parse, parse_method
from cache_policies.retrieval import SparsePrefill
from cache_policies.step.request import Engine, published_tokens, readable_tokens, span_of
from tests.cache_policies.worker import HEADS, KV_HEADS, Text, Worker

PROMPT = 1400
CHUNKS = [512, 512, 376, 1, 1]
KERNELS = [CpuKernel, ReferenceKernel]


def peaked(length: int, seed: int = 0) -> Text:
    """A text whose queries want a few keys each, as real ones do."""
    text = Text(length, seed)
    rng = torch.Generator().manual_seed(seed)
    wanted = torch.randint(length, (length,), generator=rng)
    wanted = torch.minimum(wanted, torch.arange(length))
    at = (wanted // 64) * 64  # neighbours want the same
    text.query = text.key[at].repeat_interleave(HEADS // KV_HEADS, 1) * 2 + 0.2 * text.query
    return text


def run(method: str, text: Text, kernel: type, codec: str = "raw") -> list[torch.Tensor]:
    worker = Worker(codec, kernel=kernel)
    return worker.run(worker.start(text, method, PROMPT), CHUNKS)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("codec", ["raw", "kivi-4bit"])
@pytest.mark.parametrize(
    "method", ["sparse-prefill(topk=99,exact=0)", "sparse-prefill(exact=1400)"]
)
def test_reading_everything_is_plain_attention(method: str, codec: str, kernel: type) -> None:
    text = Text(PROMPT + 2)
    for got, expected in zip(
        run(method, text, kernel, codec), run("all", text, kernel, codec), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("codec", ["raw", "fp16", "int8"])
def test_the_kernels_agree(codec: str) -> None:
    text = peaked(PROMPT + 2)
    method = "sparse-prefill(coverage=0.8,exact=0)"
    reference, cpu = (run(method, text, kernel, codec) for kernel in reversed(KERNELS))
    for got, expected in zip(cpu, reference, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


def test_more_coverage_is_closer_and_reads_more() -> None:
    text = peaked(PROMPT + 2)
    exact = torch.cat(run("all", text, CpuKernel))
    errors, shares = [], []
    for coverage in (0.5, 0.8, 0.95):
        worker = Worker("raw")
        sequence = worker.start(text, f"sparse-prefill(coverage={coverage},exact=0)", PROMPT)
        assert sequence.state is not None
        seen: list[tuple[float, float]] = []
        sequence.state.reading.report = lambda *both, seen=seen: seen.append(both)
        output = torch.cat(worker.run(sequence, CHUNKS))
        errors.append(float((output - exact).norm() / exact.norm()))
        ((read, possible),) = seen
        shares.append(read / possible)
        # decode steps read everything
        torch.testing.assert_close(output[PROMPT:], exact[PROMPT:], rtol=1e-4, atol=1e-5)
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.1
    assert shares[0] < shares[1] < shares[2] < 1


def test_short_prompts_and_the_last_window_are_exact() -> None:
    text = Text(PROMPT + 2)
    exact = torch.cat(run("all", text, CpuKernel))
    sparse = torch.cat(run("sparse-prefill(topk=1,exact=600,window=100)", text, CpuKernel))
    differs = (sparse - exact).abs().amax((1, 2)) > 1e-3
    assert not differs[:600].any()
    assert not differs[PROMPT - 100 :].any()
    assert differs[700:1200].float().mean() > 0.9


@settings(max_examples=60, deadline=None)
@given(
    pages=st.integers(1, 40),
    coverage=st.floats(0.05, 0.99),
    rest=st.floats(0, 1),
    init=st.sampled_from([0, 128, 300]),
    seed=st.integers(0, 99),
)
def test_the_fewest_pages_that_cover_are_chosen(
    pages: int, coverage: float, rest: float, init: int, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    mass = torch.rand(3, 2, pages, generator=rng).pow(4)
    mass = mass / mass.sum(-1, keepdim=True) * (1 - rest)
    sparse = SparsePrefill(coverage=coverage, init=init)
    chosen, count = sparse.choose(mass, torch.full((3, 2), rest), 128)
    always = min(-(-init // 128), pages)
    for block in range(3):
        for head in range(2):
            row = chosen[block, head, : count[block, head]].tolist()
            assert row == sorted(set(row))
            assert set(range(always)) <= set(row)
            reached = rest + float(mass[block, head, row].sum())
            assert reached >= coverage - 1e-4 or len(row) == pages
            if len(row) > always:  # without its lightest free page it is not enough
                free = [float(mass[block, head, p]) for p in row if p >= always]
                assert reached - min(free) < coverage + 1e-4


def test_grammar() -> None:
    for text in ("sparse-prefill", "snapkv(budget=300)+sparse-prefill(coverage=0.9)+kivi-4bit",
                 "quest(topk=8)+sparse-prefill(topk=16,exact=0)+int8"):  # fmt: skip
        assert parse(str(parse(text))) == parse(text)
    for text, message in (
        ("sparse-prefill(coverage=1.5)", "coverage=1.5 is not above 0 and below 1"),
        ("sparse-prefill(samples=0)", "samples=0 is not between 1 and 128"),
        ("sparse-prefill(exact=-1)", "exact=-1 is below 0"),
        ("sparse-prefill+sparse-prefill(topk=3)", "cannot be combined"),
        ("streaming-llm+sparse-prefill", "prefill=bounded reads a part already"),
        ("sparse-prefill(budget=3)", "has no parameter 'budget'"),
    ):
        with pytest.raises(PolicyError, match=message.replace("(", r"\(")):
            parse(text)


def test_only_exact_pages_are_published() -> None:
    engine = Engine(Worker("raw").plan, 4, 8000, 10**6)
    for text, published, readable in (
        ("sparse-prefill", 2048, None),
        ("sparse-prefill(exact=0)", 0, None),
        ("snapkv(budget=300)+sparse-prefill(exact=512)", 512, 5000 - 32),
        ("h2o+sparse-prefill(exact=512)", 512, 0),
    ):
        method = parse_method(text)
        span = span_of(method, engine, 5000)
        assert published_tokens(method, span) == published
        assert readable_tokens(method, span) == readable
