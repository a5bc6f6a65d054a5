"""Recurrences of RWKV and Griffin in C++ against their definitions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize, softplus

from linear_models.scans import cpu, reference
from linear_models.scans.batch import Batch
from linear_models.scans.shift import token_shift

NEAR = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}
SLOTS = 4
isas = pytest.mark.parametrize("isa", cpu.supported_isas())
requests = st.lists(st.tuples(st.integers(1, 21), st.booleans()), min_size=1, max_size=SLOTS)
Step = Callable[..., torch.Tensor]


def batch(lengths: list[int], slots: list[int], has_state: list[bool]) -> Batch:
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return Batch(starts, torch.tensor(slots, dtype=torch.int32), torch.tensor(has_state))


class Recurrence(NamedTuple):
    """A step, states of all slots, and the width and number of its inputs."""

    step: Step
    states: torch.Tensor
    width: int
    inputs: int = 3


def wkv5(heads: int, size: int, fastest: float = 2.0) -> Recurrence:
    """With decays of up to ``e^-e^fastest``."""
    decay = torch.exp(-torch.exp(torch.rand(heads, size) * (6 + fastest) - 6))
    bonus = torch.randn(heads, size)

    def step(where: Any, inputs: Any, states: torch.Tensor, b: Batch, **more: Any) -> torch.Tensor:
        out = torch.full_like(inputs[0], torch.nan)
        where.wkv5(*inputs, decay, bonus, states, b, out, **more)
        return out

    return Recurrence(step, torch.randn(SLOTS, heads, size, size), heads * size)


def wkv7(heads: int, size: int, fastest: float = 2.0) -> Recurrence:
    """With decays around those of ``sigmoid(fastest)``."""

    def step(where: Any, inputs: Any, states: torch.Tensor, b: Batch, **more: Any) -> torch.Tensor:
        out = torch.full_like(inputs[0], torch.nan)
        r, w, k, v, removed, rate = inputs
        removed = normalize(removed.unflatten(1, (heads, size)), dim=-1).flatten(1)
        where.wkv7(r, w + fastest, k, v, removed, torch.sigmoid(rate), states, b, out, **more)
        return out

    return Recurrence(step, torch.randn(SLOTS, heads, size, size), heads * size, 6)


def rg_lru(channels: int) -> Recurrence:
    """Griffin's."""
    rate = -8 * softplus(torch.randn(channels) * 3 - 4)

    def step(where: Any, inputs: Any, states: torch.Tensor, b: Batch, **more: Any) -> torch.Tensor:
        out = torch.full_like(inputs[0], torch.nan)
        where.rg_lru(*inputs, rate, states, b, out, **more)
        return out

    return Recurrence(step, torch.randn(SLOTS, channels), channels)


def tokens(count: int, width: int, dtype: torch.dtype, inputs: int = 3) -> list[torch.Tensor]:
    """Inputs as columns of a wider tensor."""
    wide = (torch.randn(count, inputs * width + 5) * 2).to(dtype)
    return list(wide[:, 5:].chunk(inputs, dim=1))


@isas
@settings(max_examples=60, deadline=None)
@given(
    requests=requests,
    which=st.sampled_from(
        [(made, *shape) for made in (wkv5, wkv7) for shape in [(1, 16), (3, 32), (1, 48), (2, 64)]]
        + [(rg_lru, channels) for channels in (1, 40, 300)]
    ),
    dtype=st.sampled_from(list(NEAR)), fastest=st.sampled_from([-1.0, 2.0, 2.5, 6.0]),
    seed=st.integers(0, 99), nowhere=st.booleans(),
)  # fmt: skip
def test_equals_the_definition(
    isa: str, requests: Any, which: Any, dtype: torch.dtype, fastest: float, seed: int,
    nowhere: bool,
) -> None:  # fmt: skip
    """At decays so fast that a chunk of tokens, or of some of them, cannot be taken at once too."""
    torch.manual_seed(seed)
    made, *shape = which
    step, states, width, count = made(*shape) if made is rg_lru else made(*shape, fastest)
    lengths, has = ([r[i] for r in requests] for i in (0, 1))
    slots = torch.randperm(SLOTS)[: len(lengths)].tolist()
    if nowhere:
        slots[0] = -1
    b, inputs = batch(lengths, slots, has), tokens(sum(lengths), width, dtype, count)
    theirs, ours = states.clone(), states.clone()
    expected = step(reference, inputs, theirs, b)
    got = step(cpu, inputs, ours, b, isa=isa)
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(got, expected, atol=NEAR[dtype] * scale, rtol=NEAR[dtype])
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)
    others = [i for i in range(SLOTS) if i not in slots]
    assert torch.equal(ours[others], states[others])


@isas
@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(1, 39), max_size=4, unique=True))
def test_chunks_are_the_whole(isa: str, cuts: list[int]) -> None:
    torch.manual_seed(0)
    for step, states, width, count in (wkv5(2, 64), wkv7(2, 64), rg_lru(40)):
        inputs = tokens(40, width, torch.float32, count)
        whole, parts = states.clone(), states.clone()
        expected = step(cpu, inputs, whole, batch([40], [2], [False]), isa=isa)
        got = [
            step(cpu, [x[a:b] for x in inputs], parts, batch([b - a], [2], [a > 0]), isa=isa)
            for a, b in pairwise([0, *sorted(cuts), 40])
        ]
        torch.testing.assert_close(torch.cat(got), expected, atol=1e-3, rtol=1e-5)
        torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-5)


@isas
def test_no_decay_and_no_memory(isa: str) -> None:
    """Decays of 1 and 0, the ends of their range."""
    torch.manual_seed(0)
    _, states, width, _ = wkv5(1, 32)
    decay, inputs = torch.tensor([[1.0, 0.0] * 16]), tokens(20, width, torch.float32)
    b, bonus = batch([20], [1], [True]), torch.zeros(1, 32)
    found = []
    for where, more in ((reference, {}), (cpu, {"isa": isa})):
        out, kept = torch.empty_like(inputs[0]), states.clone()
        where.wkv5(*inputs, decay, bonus, kept, b, out, **more)  # type: ignore[attr-defined]
        found.append((out, kept))
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-5)


def test_threads_change_nothing() -> None:
    torch.manual_seed(0)
    b = batch([1, 39], [1, 3], [True, False])
    for step, states, width, count in (wkv5(5, 32), wkv7(5, 32), rg_lru(600)):
        inputs = tokens(40, width, torch.bfloat16, count)
        one = step(cpu, inputs, states.clone(), b, num_threads=1)
        assert torch.equal(step(cpu, inputs, states.clone(), b, num_threads=2), one)


def test_in_place_as_the_model_calls_it() -> None:
    torch.manual_seed(0)
    _, states, width, _ = rg_lru(40)
    rate, b = -torch.rand(width), batch([12], [0], [True])
    x, *gates = (part.contiguous() for part in tokens(12, width, torch.float32))
    expected = torch.empty_like(x)
    reference.rg_lru(x, *gates, rate, states.clone(), b, expected)
    cpu.rg_lru(x, *gates, rate, states.clone(), b, x)
    torch.testing.assert_close(x, expected, atol=2e-5, rtol=2e-5)


def test_a_convolution_without_activation() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(9, 20), torch.randn(20, 4), torch.randn(20)
    states, b, found = torch.randn(2, 3, 20), batch([4, 5], [1, 0], [True, False]), []
    for where in (reference, cpu):
        out, seen = torch.empty_like(x), states.clone()
        where.causal_conv(x, weight, bias, seen, b, out, activate=False)
        found.append((out, seen))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)
    first = torch.cat([torch.zeros(3, 20), x[4:]])[:4] * weight.T
    torch.testing.assert_close(found[0][0][4], first.sum(0) + bias)


@settings(max_examples=40, deadline=None)
@given(requests=requests, nowhere=st.booleans())
def test_token_shift(requests: Any, nowhere: bool) -> None:
    lengths, has = ([r[i] for r in requests] for i in (0, 1))
    slots = list(range(len(lengths)))
    if nowhere:
        slots[-1] = -1
    x, states = torch.randn(sum(lengths), 3), torch.randn(SLOTS, 3)
    before, b = states.clone(), batch(lengths, slots, has)
    shifted = token_shift(x, states, b)
    for (first, last), slot, known in zip(b.spans, slots, has, strict=True):
        earlier = before[slot] if known and slot >= 0 else torch.zeros(3)
        assert torch.equal(shifted[first:last], torch.cat([earlier[None], x[first : last - 1]]))
        if slot >= 0:
            before[slot] = x[last - 1]
    assert torch.equal(states, before)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"heads": (1, 24)}, "heads of 24 are not a multiple of 16"),
        ({"heads": (1, 272)}, "heads of 272 are not a multiple of 16 up to 256"),
        ({"states": torch.zeros(2, 1, 16, 8)}, r"states: \(1, 16, 8\)"),
        ({"states": torch.zeros(2, 1, 16, 16).half()}, "torch.float16 is not float32"),
        ({"states": torch.zeros(2, 1, 16, 16).mT}, "a slot is not contiguous"),
        ({"r": torch.zeros(4, 17)}, r"r: \(4, 17\), not"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changed: dict[str, Any], message: str) -> None:
    heads, size = changed.get("heads", (1, 16))
    x = torch.zeros(4, heads * size)
    states = changed.get("states", torch.zeros(2, heads, size, size))
    decay, b = torch.ones(heads, size), batch([4], [0], [True])
    r = changed.get("r", x)
    with pytest.raises(ValueError, match=message):
        cpu.wkv5(r, x, x, decay, decay, states, b, x.clone())
    with pytest.raises(ValueError, match=message):
        cpu.wkv7(r, x, x, x, x, x, states, b, x.clone())
