"""Dropping and reading a part, in one layer: kept tokens, attention, leaks between requests."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_policies.kernels.reference import ReferenceKernel
from cache_policies.retention import retention_methods
from tests.cache_policies import oracles
from tests.cache_policies.worker import (
    GROUP_ERROR,
    HEADS,
    KV_HEADS,
    ROPE,
    SCALE,
    SIZE,
    Text,
    Worker,
)

PROMPT = 700
TEXT = Text(1400)
Oracle = Callable[[Text, int], torch.Tensor]

ORACLES: dict[str, Oracle] = {
    "snapkv(budget=150)": partial(oracles.snapkv, keep=150),
    "snapkv(ratio=0.25,window=16,kernel=7)": partial(oracles.snapkv, keep=175, window=16, kernel=7),
    "tova(budget=100)": partial(oracles.tova, keep=100),
    "h2o(heavy=90,recent=50)": partial(oracles.h2o, heavy=90, recent=50),
    "keydiff(budget=150,prefill=full)": partial(oracles.keydiff, keep=150),
    "knorm(budget=150)": partial(oracles.knorm, keep=150),
    "streaming-llm(sinks=4,window=96)": lambda _, n: oracles.streaming(n, 4, 96),
    "streaming-llm(sinks=4,window=96,prefill=full)": lambda _, n: oracles.streaming(n, 4, 96),
    "expected-attention(budget=150)": partial(oracles.expected_attention, keep=150),
    "lagkv(budget=400)": partial(oracles.lagkv, keep=400),
    "r-kv(budget=150)": partial(oracles.r_kv, keep=150),
    "r-kv(budget=150,balance=0.9)": partial(oracles.r_kv, keep=150, balance=0.9),
    "compactor(budget=150)": partial(oracles.compactor, keep=150),
    "compactor(budget=150,blend=9,chunk=64)": partial(
        oracles.compactor, keep=150, blend=9, chunk=64
    ),
}


def _chunks(rng: random.Random, total: int) -> list[int]:
    sizes = []
    while sum(sizes) < total:
        sizes.append(min(rng.choice((1, 30, 128, 200, 500)), total - sum(sizes)))
    return sizes


def _kept(positions: torch.Tensor, length: int) -> torch.Tensor:
    mask = torch.zeros(KV_HEADS, length, dtype=torch.bool)
    for head in range(KV_HEADS):
        mask[head, positions[head].long()] = True
    assert mask.sum() == positions.numel(), "a token is held twice"
    return mask


@pytest.mark.parametrize("method", list(ORACLES))
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("caching", [True, False])
def test_the_tokens_of_the_definition_are_kept_whatever_the_chunks(
    method: str, seed: int, caching: bool
) -> None:
    """Chunked equals unchunked, and both equal the whole-tensor oracle, but at ties."""
    expected = ORACLES[method](TEXT, PROMPT)
    worker = Worker("raw", caching=caching)
    sequence = worker.start(TEXT, method, PROMPT)
    worker.run(sequence, _chunks(random.Random(seed), PROMPT))
    kept = _kept(worker.positions(sequence), PROMPT)
    assert torch.equal(kept.sum(1), expected.sum(1))
    assert (kept ^ expected).sum() <= 2 * KV_HEADS, "more than a tie differs"


def test_heads_that_look_at_the_sinks_do_not_choose_for_their_group() -> None:
    """Expected attention is normalized over the keys after the sinks."""
    torch.manual_seed(0)
    text, ahead = Text(PROMPT), torch.arange(PROMPT, PROMPT + 1)
    towards = torch.randn(HEADS, 1, SIZE) * 2
    towards[1::2] = 0  # these heads look at no sink
    place = torch.arange(PROMPT)
    plain = text.query.transpose(0, 1) + towards
    text.query = ROPE.rotate(plain, place).transpose(0, 1).contiguous()
    text.key[:4] += ROPE.rotate(towards[::3], ahead).transpose(0, 1)
    expected = oracles.expected_attention(text, PROMPT, keep=150)
    worker = Worker("raw")
    sequence = worker.start(text, "expected-attention(budget=150)", PROMPT)
    worker.run(sequence, [300, 400])
    kept = _kept(worker.positions(sequence), PROMPT)
    assert (kept ^ expected).sum() <= 2 * KV_HEADS, "more than a tie differs"


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(list(retention_methods())),
    codec=st.sampled_from(list(GROUP_ERROR)),
    seed=st.integers(0, 1000),
    caching=st.booleans(),
)
def test_what_is_held_is_what_was_computed(name: str, codec: str, seed: int, caching: bool) -> None:
    """Through prefill, cuts and decode, for every method on every kind of page."""
    rng = random.Random(seed)
    sizes = {"streaming-llm": "sinks=4,window=196", "h2o": "heavy=120,recent=80",
             "lagkv": "budget=200,lag=64"}.get(name, "budget=200")  # fmt: skip
    interval = f",interval={rng.choice((1, 20, 128))}"
    decode_cuts = retention_methods()[name].DECODE_CUTS
    method = f"{name}({sizes}{interval if decode_cuts else ''})"
    prompt = rng.choice((150, 333, 700))
    worker = Worker(codec, caching=caching)
    sequence = worker.start(TEXT, method, prompt)
    for chunk in [*_chunks(rng, prompt), *[1] * rng.randrange(200)]:
        worker.step([(sequence, chunk)])
    positions = worker.positions(sequence)
    _kept(positions, sequence.computed)
    assert (positions == sequence.computed - 1).any(1).all(), "the last token is held"
    key, value = worker.held(sequence)
    for head in range(KV_HEADS):
        at = positions[head].long()
        tolerance = GROUP_ERROR[codec]
        assert (key[head] - TEXT.key[at, head]).abs().mean() < tolerance
        assert (value[head] - TEXT.value[at, head]).abs().mean() < tolerance


@pytest.mark.parametrize("method", ["tova(budget=200)", "snapkv(budget=200)", "all"])
@pytest.mark.parametrize("kernel", [None, ReferenceKernel])
def test_attention_sees_the_held_and_the_fresh_tokens_only(
    method: str, kernel: type[ReferenceKernel] | None
) -> None:
    worker = Worker("raw", **({"kernel": kernel} if kernel else {}))  # type: ignore[arg-type]
    sequence = worker.start(TEXT, method, PROMPT)
    worker.run(sequence, [300, 400])
    for _ in range(3):
        now = sequence.computed
        held = torch.arange(now).expand(KV_HEADS, -1)
        if sequence.state is not None:
            held = worker.positions(sequence).long()
        (output,) = worker.step([(sequence, 1)])
        for head in range(HEADS):
            at = torch.cat([held[head // 3], torch.tensor([now])])
            weights = (TEXT.key[at, head // 3] @ TEXT.query[now, head] * SCALE).softmax(0)
            expected = weights @ TEXT.value[at, head // 3]
            torch.testing.assert_close(output[0, head], expected, rtol=1e-4, atol=1e-5)


METHODS = (
    "all", "snapkv(budget=200)", "h2o(heavy=100,recent=60)", "quest(topk=1)", "tova(budget=100)",
    "streaming-llm(sinks=4,window=100)", "infllm(topk=1,local=128)", "keydiff(budget=120)",
)  # fmt: skip


def test_a_batch_of_different_policies_equals_each_alone() -> None:
    """State never leaks: pages come back poisoned and are handed to the next request at once."""
    texts = [Text(900, seed) for seed in range(len(METHODS))]
    alone = []
    for text, method in zip(texts, METHODS, strict=True):
        worker = Worker("fp16")
        alone.append(worker.run(worker.start(text, method, 600), [250, 350, *[1] * 40]))
    worker = Worker("fp16")
    first = worker.start(Text(900, 99), "snapkv(budget=300)", 600)
    worker.run(first, [600, 1, 1])
    worker.release(first)
    together = [worker.start(t, m, 600) for t, m in zip(texts, METHODS, strict=True)]
    for step, chunk in enumerate([250, 350, *[1] * 40]):
        outputs = worker.step([(s, chunk) for s in together])
        for output, expected in zip(outputs, alone, strict=True):
            torch.testing.assert_close(output, expected[step], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "all"])
def test_a_request_that_starts_over_forgets(method: str) -> None:
    worker = Worker("raw")
    sequence = worker.start(TEXT, method, 600)
    expected = worker.run(sequence, [200, 400, 1, 1])
    worker.release(sequence)
    sequence.computed = 0
    for got, want in zip(worker.run(sequence, [200, 400, 1, 1]), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "method", ["snapkv(budget=150)", "lagkv(budget=300)", "pyramidkv(budget=90)"]
)
@pytest.mark.parametrize("caching", [True, False])
def test_an_answer_in_the_chunk_that_ends_the_prompt_is_kept(method: str, caching: bool) -> None:
    """So a resumed request brings it: these methods keep every token of the answer."""
    worker = Worker("raw", caching=caching)
    sequence = worker.start(TEXT, method, PROMPT)
    worker.run(sequence, [400, 380, 1])
    for positions in worker.positions(sequence):
        assert set(range(PROMPT, PROMPT + 81)) <= set(positions.tolist())


@pytest.mark.parametrize("method", ["compactor(budget=150)", "expected-attention(budget=150)"])
@pytest.mark.parametrize("second", ["", "+quest(topk=1)"])
def test_what_was_noted_of_the_prompt_goes_with_the_last_cut(method: str, second: str) -> None:
    worker = Worker("raw")
    sequence = worker.start(TEXT, method + second, PROMPT)
    assert sequence.state is not None
    worker.run(sequence, [300])
    known = sequence.state.layers[0]
    assert known.near or known.queries
    worker.run(sequence, [PROMPT - 300, 1])
    assert known.near is None
    assert known.queries is None


@pytest.mark.parametrize("method", ["compactor(budget=150)", "expected-attention(budget=150)"])
@pytest.mark.parametrize("prompt", [150, 151])
def test_nothing_is_noted_of_a_prompt_that_is_never_cut(method: str, prompt: int) -> None:
    worker = Worker("raw")
    sequence = worker.start(TEXT, method, prompt)
    assert sequence.state is not None
    worker.run(sequence, [100])
    known = sequence.state.layers[0]
    assert bool(known.near or known.queries) == sequence.span.drops == (prompt > 150)
    worker.run(sequence, [prompt - 100, *[1] * 60])
    assert (known.near, known.queries) == (None, None)
    assert worker.positions(sequence).shape[1] == 150 + 60


def test_a_step_the_worker_cannot_follow_is_an_error() -> None:
    worker = Worker("raw")
    sequence = worker.start(TEXT, "h2o(heavy=100,recent=60)", 600)
    worker.run(sequence, [128])
    sequence.computed = 256
    with pytest.raises(RuntimeError, match="continues at token 256, but this worker has seen 128"):
        worker.step([(sequence, 10)])


@pytest.mark.parametrize("method", ["infllm(topk=2,local=128,init=128)", "quest(topk=2)"])
def test_retrieval_finds_the_page_with_the_wanted_key(method: str) -> None:
    text = Text(900)
    text.key[300] *= 4  # stands out in its page, and is what the last queries look for
    text.query[290:] = text.key[300].repeat_interleave(HEADS // KV_HEADS, 0) / 4
    worker = Worker("raw")
    sequence = worker.start(text, method, 850)
    worker.run(sequence, [425, 425])
    (output,) = worker.step([(sequence, 1)])
    for head in range(HEADS):
        torch.testing.assert_close(output[0, head], text.value[300, head // 3], rtol=0.05, atol=0.1)


@pytest.mark.parametrize("method", ["infllm(topk=60,local=128)", "quest(topk=60)"])
def test_retrieval_of_all_pages_is_plain_attention(method: str) -> None:
    outputs = []
    for chosen in (method, "all"):
        worker = Worker("kivi-4bit")
        outputs.append(worker.run(worker.start(TEXT, chosen, PROMPT), [300, 400, 1, 1, 1]))
    for got, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(got, expected)


def test_cache_positions_let_the_sinks_follow_the_window() -> None:
    worker = Worker("raw")
    sequence = worker.start(TEXT, "streaming-llm(sinks=4,window=96,positions=cache)", PROMPT)
    worker.run(sequence, [300, 400, *[1] * 130])
    assert sequence.state is not None
    dropped = sequence.span.prompt + 128 - 100  # up to the last cut
    key, _ = worker.held(sequence)
    expected = oracles._turn(dropped) @ TEXT.key[:4, 0].double().T
    torch.testing.assert_close(key[0, :4].double(), expected.T, rtol=1e-4, atol=1e-4)


def test_1500_decode_tokens_stay_within_the_bound() -> None:
    text = Text(1900)
    for method, keep in (("h2o(heavy=100,recent=60)", 160), ("tova(budget=120)", 120),
                         ("streaming-llm(sinks=4,window=100)", 104), ("keydiff(budget=120)", 120),
                         ("knorm(budget=120)", 120), ("random(budget=120)", 120)):  # fmt: skip
        worker = Worker("fp16", pages=40)
        sequence = worker.start(text, method, 300)
        most = 0
        for chunk in [300, *[1] * 1500]:
            worker.step([(sequence, chunk)])
            most = max(most, worker.positions(sequence).shape[1])
        assert keep < most < keep + 128
        worker.release(sequence)
        assert len(worker.free) == 39
