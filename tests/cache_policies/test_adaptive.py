"""Budgets by head: what is kept, where it lies, and what is attended to, from the definition."""

from __future__ import annotations

from functools import cache, partial
from math import ceil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache_policies.errors import PolicyError
from cache_policies.kernels.contract import Reads
from cache_policies.kernels.cpu import CpuKernel
from cache_policies.kernels.reference import ReferenceKernel
from cache_policies.policy import parse_method
from cache_policies.retention import retention_methods
from cache_policies.retention.adaptive import SAFEGUARD, Budgets
from cache_policies.retention.knorm import Knorm
from cache_policies.step.heads import Latest
from tests.cache_policies import oracles
from tests.cache_policies.worker import (
    GROUP_ERROR,
    HEADS,
    KV_HEADS,
    PAGE,
    SCALE,
    SIZE,
    Sequence,
    Text,
    Worker,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from cache_policies.kernels.contract import Kernel

PROMPT, ANSWER, KEEP = 1300, 300, 450
GROUP = HEADS // KV_HEADS


def _text(seed: int = 0, length: int = PROMPT + ANSWER) -> Text:
    """A text in which one head looks at every twentieth token, the other at many."""
    text = Text(length, seed)
    text.key[:, seed % 2] *= 0.3
    text.query[..., 28:32] += 2  # channels that rotary embedding turns slowly
    text.key[::20, 1 - seed % 2, 28:32] += 4
    return text


TEXT = _text()
UNEVEN = {
    f"snapkv(budget={KEEP},heads=adaptive)": partial(oracles.snapkv, keep=KEEP),
    "h2o(heavy=350,recent=100,heads=adaptive)": partial(oracles.h2o, heavy=350, recent=100),
    f"expected-attention(budget={KEEP},heads=adaptive)": partial(
        oracles.expected_attention, keep=KEEP
    ),
}
CUTTING = [
    "h2o(heavy=350,recent=100,interval=20,heads=adaptive)",
    "h2o(heavy=350,recent=100,interval=150,heads=adaptive,prefill=bounded)",
    "h2o(ratio=0.4,interval=40,heads=adaptive)",
]


@settings(max_examples=200, deadline=None)
@given(
    heads=st.integers(1, 5),
    keep=st.integers(1, 40),
    more=st.integers(1, 60),
    seed=st.integers(0, 999),
)
def test_pages_of_one_token_are_the_paper(heads: int, keep: int, more: int, seed: int) -> None:
    """A safeguard share of every head's best tokens, then the best of all heads."""
    rng = torch.Generator().manual_seed(seed)
    score = torch.rand(heads, keep + more, generator=rng) ** (seed % 7 + 1)
    score *= torch.rand(heads, 1, generator=rng)
    safe = max(1, ceil(SAFEGUARD * keep))
    kept = torch.zeros_like(score, dtype=torch.bool)
    for head, row in enumerate(score):
        kept[head, row.sort(descending=True).indices[:safe]] = True
    rest = score.masked_fill(kept, 9).flatten().sort(descending=True).indices[: heads * keep]
    kept.view(-1)[rest] = True
    chosen = Budgets.of(heads, keep, keep + more, 1).select(score)
    for row, expected in zip(chosen, kept, strict=True):
        assert row[row >= 0].tolist() == expected.nonzero()[:, 0].tolist()


@settings(max_examples=200, deadline=None)
@given(
    heads=st.integers(1, 4),
    keep=st.integers(1, 60),
    more=st.integers(1, 60),
    page=st.sampled_from([4, 16]),
    must=st.integers(0, 60),
    held=st.lists(st.integers(0, 5), min_size=4, max_size=4),
    seed=st.integers(0, 999),
)
def test_pages_are_divided_and_none_is_left(
    heads: int, keep: int, more: int, page: int, must: int, held: list[int], seed: int
) -> None:
    """Whatever must stay, and whatever heads hold after an earlier cut."""
    rng = torch.Generator().manual_seed(seed)
    each = [n * page + keep + more for n in held[:heads]]
    candidates = max(each)
    score = torch.full((heads, candidates), -torch.inf)
    for head, count in enumerate(each):
        score[head, candidates - count :] = torch.rand(count, generator=rng)
        score[head, candidates - min(must, keep) :] = torch.inf
    budgets = Budgets.of(heads, keep, candidates, page)
    kept = budgets.select(score)
    counts = (kept >= 0).sum(1)
    assert counts.sum() == heads * keep, "as much is held as with uniform heads"
    assert ((counts - budgets.tail) % page == 0).all()
    assert (counts >= min(keep, SAFEGUARD * keep)).all()
    for head in range(heads):
        row = kept[head, budgets.places - int(counts[head]) :]
        assert (row.diff() > 0).all(), "in the order of the text, behind what the head lacks"
        assert (score[head, row] > -torch.inf).all(), "a token that the head has"
        assert (score[head, row] == torch.inf).sum() == min(must, keep)


def _positions(worker: Worker, sequence: Sequence) -> list[torch.Tensor]:
    """Of the tokens that each head holds."""
    held = [row[row >= 0].long() for row in worker.positions(sequence)]
    assert all(len(set(row.tolist())) == len(row) for row in held), "a token is held twice"
    return held


def _attends(text: Text, held: list[torch.Tensor], now: int) -> torch.Tensor:
    """Attention of the token at ``now`` over what each head holds, ``[heads, d]``."""
    output = torch.zeros(HEADS, SIZE)
    for head in range(HEADS):
        at = torch.cat([held[head // GROUP], torch.tensor([now])])
        weights = (text.key[at, head // GROUP] @ text.query[now, head] * SCALE).softmax(0)
        output[head] = weights @ text.value[at, head // GROUP]
    return output


@cache
def _expected(method: str) -> torch.Tensor:
    return UNEVEN[method](TEXT, PROMPT, choose=oracles.adaptive)


@pytest.mark.parametrize(
    ("kernel", "chunks"),
    [
        (CpuKernel, [PROMPT]),
        (CpuKernel, [500, 800]),
        (CpuKernel, [128, 1, 600, 571]),
        (ReferenceKernel, [500, 800]),
    ],
)
@pytest.mark.parametrize("method", UNEVEN)
def test_the_tokens_of_the_definition_are_kept_and_attended_to(
    method: str, chunks: list[int], kernel: type[Kernel]
) -> None:
    expected = _expected(method)
    assert expected.sum(1).tolist() != [KEEP, KEEP], "the heads need unequal numbers"
    worker = Worker("raw", kernel=kernel)
    sequence = worker.start(TEXT, method, PROMPT)
    worker.run(sequence, chunks)
    held = _positions(worker, sequence)
    kept = torch.zeros_like(expected)
    for head, at in enumerate(held):
        kept[head, at] = True
    assert torch.equal(kept.sum(1), expected.sum(1))
    assert (kept ^ expected).sum() <= 2 * KV_HEADS, "more than a tie differs"
    for now in range(PROMPT, PROMPT + 100):  # before the next cut of h2o
        (output,) = worker.step([(sequence, 1)])
        torch.testing.assert_close(output[0], _attends(TEXT, held, now), rtol=1e-4, atol=1e-5)
        held = [torch.cat([at, torch.tensor([now])]) for at in held]


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("method", [*UNEVEN, *CUTTING])
def test_the_pages_are_those_of_uniform_heads(method: str, caching: bool) -> None:
    """Heads hold unequal numbers of tokens; the row, and so the memory, is the same."""
    rows, differ = [], False
    for heads in (method, method.replace(",heads=adaptive", "")):
        worker = Worker("fp16", caching=caching)
        sequence = worker.start(TEXT, heads, PROMPT)
        rows.append([])
        for chunk in (500, 800, *[1] * ANSWER):
            worker.step([(sequence, chunk)])
            held = _positions(worker, sequence)
            differ |= len({len(at) for at in held}) > 1
            count = sum(map(len, held))
            assert sequence.state is not None
            known = sequence.state.layers[0].position
            remembered = None if known is None else known.shape
            rows[-1].append((int((sequence.row > 0).sum()), len(worker.free), count, remembered))
    assert differ
    assert rows[0] == rows[1]


@pytest.mark.parametrize("codec", GROUP_ERROR)
@pytest.mark.parametrize("method", [*UNEVEN, *CUTTING])
def test_what_is_held_is_what_was_computed(method: str, codec: str) -> None:
    worker = Worker(codec, caching=codec != "int8")
    sequence = worker.start(TEXT, method, PROMPT)
    for chunk in (500, 700, 200, *[1] * 150):  # an answer of a request that starts over
        worker.step([(sequence, chunk)])
    positions, computed = worker.positions(sequence), sequence.computed
    assert (positions == computed - 1).any(1).all(), "the newest token was dropped"
    for got, text in zip(worker.held(sequence), (TEXT.key, TEXT.value), strict=True):
        for head, row in enumerate(positions):
            there = row >= 0
            error = got[head, there] - text[row[there].long(), head]
            assert error.abs().mean() < GROUP_ERROR[codec]


@pytest.mark.parametrize("method", CUTTING)
def test_later_cuts_choose_among_what_each_head_holds(method: str) -> None:
    worker = Worker("raw")
    sequence = worker.start(TEXT, method, PROMPT)
    worker.run(sequence, [500, 600, 200])
    before = _positions(worker, sequence)
    for now in range(PROMPT, PROMPT + 200):
        (output,) = worker.step([(sequence, 1)])
        torch.testing.assert_close(output[0], _attends(TEXT, before, now), rtol=1e-4, atol=1e-5)
        held = _positions(worker, sequence)
        for old, new in zip(before, held, strict=True):
            assert set(new.tolist()) <= {*old.tolist(), now}
        before = held


def test_a_batch_with_others_equals_each_alone() -> None:
    """Beside uniform, retrieving and sparsely prefilled requests, and after starting over."""
    methods = [
        *UNEVEN, CUTTING[0], "all", "snapkv(budget=200)", "quest(topk=1)",
        "pyramidkv(budget=300,heads=adaptive)", "sparse-prefill(topk=2,exact=0)",
        "snapkv(budget=300,heads=adaptive)+sparse-prefill(topk=3,exact=0)",
    ]  # fmt: skip
    chunks = [700, 600, *[1] * 60]
    texts = [_text(seed) for seed in range(len(methods))]
    alone = []
    for text, method in zip(texts, methods, strict=True):
        worker = Worker("fp16", layer=(1, 3))
        alone.append(worker.run(worker.start(text, method, PROMPT), chunks))
    worker = Worker("fp16", layer=(1, 3), pages=300)
    free = len(worker.free)
    first = worker.start(_text(1), f"snapkv(budget={KEEP},heads=adaptive)", PROMPT)
    worker.run(first, [PROMPT, 1, 1])
    worker.release(first)
    first.computed = 0
    together = [worker.start(t, m, PROMPT) for t, m in zip(texts, methods, strict=True)]
    for step, chunk in enumerate(chunks):
        work = [(s, chunk) for s in together]
        if step > 20:  # starts over, a chunk at a time, while the others decode
            work.append((first, 100))
        for output, expected in zip(worker.step(work), alone, strict=False):
            torch.testing.assert_close(output, expected[step], rtol=1e-3, atol=1e-4)
        if step == 35:
            break
    for sequence in [*together, first]:
        worker.release(sequence)
    assert len(worker.free) == free


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether a slot map or lists were made, by call; what is kept is compared with new ones."""
    calls: list[bool] = []

    def of(latest: Latest[Any], source: object, make: Callable[[], Any]) -> Any:
        before, value = latest._value, kept_or_made(latest, source, make)
        calls.append(value is not before)
        new = make()
        if isinstance(new, Reads):
            assert (value.block, value.first.tolist()) == (new.block, new.first.tolist())
            assert torch.equal(value.count, new.count)
            there = torch.arange(new.pages.shape[2]) < new.count[..., None]
            assert torch.equal(value.pages[there], new.pages[there])
        else:
            assert torch.equal(value, new)
        return value

    kept_or_made = Latest.of
    monkeypatch.setattr(Latest, "of", of)
    return calls


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), codec=st.sampled_from(["fp16", "kivi-4bit"]))
def test_maps_kept_between_steps_are_those_of_the_step(
    data: st.DataObject, codec: str, made: list[bool]
) -> None:
    """Requests of several methods come, go, cut, change places and sit out steps."""
    methods = [*UNEVEN, *CUTTING, "all", "snapkv(budget=200)", "quest(topk=1)"]
    made.clear()
    worker, running = Worker(codec, pages=400), list[Sequence]()
    for _ in range(data.draw(st.integers(3, 12))):
        if len(running) < 2 or (len(running) < 4 and data.draw(st.booleans())):
            prompt = data.draw(st.integers(100, PROMPT))
            method = data.draw(st.sampled_from(methods))
            running.append(worker.start(TEXT, method, prompt))
            worker.step([(running[-1], prompt)])
        elif data.draw(st.integers(0, 4)) == 0:
            worker.release(running.pop(data.draw(st.integers(0, len(running) - 1))))
        work = data.draw(st.permutations(running))[: data.draw(st.integers(1, len(running)))]
        for _ in range(data.draw(st.integers(1, 25))):
            if all(s.computed < len(TEXT.key) for s in work):
                worker.step([(s, 1) for s in work])
                running = [*work, *(s for s in running if s not in work)]


def test_maps_are_made_at_cuts_and_where_a_page_is_taken(made: list[bool]) -> None:
    worker = Worker("fp16")
    sequences = [worker.start(_text(i), next(iter(UNEVEN)), PROMPT) for i in range(3)]
    worker.step([(s, PROMPT) for s in sequences])
    assert any(made)
    made.clear()
    for _ in range(ANSWER):
        worker.step([(s, 1) for s in sequences])
    assert len(made) == 2 * ANSWER
    assert sum(made) <= 2 * (1 + ceil(ANSWER / PAGE))


def test_heads_that_attend_alike_get_alike() -> None:
    score = torch.rand(1, 900, generator=torch.Generator().manual_seed(0)).expand(4, -1)
    assert Budgets.of(4, 400, 900, PAGE).divide(score).tolist() == [3, 3, 3, 3]


def test_a_budget_under_a_page_is_uniform() -> None:
    worker = Worker("raw")
    sequence = worker.start(TEXT, "snapkv(budget=100,heads=adaptive)", PROMPT)
    worker.run(sequence, [PROMPT, 1])
    assert [len(at) for at in _positions(worker, sequence)] == [101, 101]


def test_only_scores_that_compare_take_adaptive_heads() -> None:
    comparable = {name for name, cls in retention_methods().items() if cls.COMPARABLE}
    assert comparable == {"snapkv", "pyramidkv", "h2o", "expected-attention"}
    with pytest.raises(PolicyError, match="knorm has heads=uniform only"):
        Knorm(heads="adaptive")
    assert "heads" not in Knorm.settable()
    assert str(parse_method("snapkv(heads=adaptive,budget=64)")) == (
        "snapkv(budget=64,heads=adaptive)"
    )
