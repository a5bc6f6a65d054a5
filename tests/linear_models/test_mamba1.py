"""Mamba 1 in C++ against its definition: any lengths, chunks, dtypes and instruction sets."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linear_models.scans import cpu, reference
from linear_models.scans.batch import Batch

NEAR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SLOTS = 5
isas = pytest.mark.parametrize("isa", cpu.supported_isas())


def batch(lengths: list[int], slots: list[int], has_state: list[bool]) -> Batch:
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return Batch(starts, torch.tensor(slots, dtype=torch.int32), torch.tensor(has_state))


def parameters(channels: int, size: int, width: int) -> dict[str, Any]:
    return {
        "a": -torch.rand(channels, size) * 8, "d": torch.randn(channels),
        "bias": torch.randn(channels), "weight": torch.randn(channels, width),
    }  # fmt: skip


def tokens(count: int, channels: int, size: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Inputs, some of which are columns of wider tensors, as they are in the layer."""
    both = torch.randn(count, 2 * channels).to(dtype)
    inner = torch.randn(count, 2 * size + 3).to(dtype)
    return {
        "x": both[:, :channels], "gate": both[:, channels:], "b": inner[:, 3 : 3 + size],
        "c": inner[:, 3 + size :], "dt": (2 * torch.randn(count, channels)).to(dtype),
    }  # fmt: skip


def scan(where: Any, p: Any, t: Any, states: torch.Tensor, b: Batch, **more: Any) -> torch.Tensor:
    out = torch.full_like(t["dt"], torch.nan)
    where.selective_scan(
        t["x"], t["dt"], p["a"], t["b"], t["c"], p["d"], p["bias"], t["gate"], states, b, out,
        **more,
    )  # fmt: skip
    return out


def conv(where: Any, p: Any, t: Any, states: torch.Tensor, b: Batch, **more: Any) -> torch.Tensor:
    out = torch.full_like(t["dt"], torch.nan)
    where.causal_conv(t["x"], p["weight"], p["bias"], states, b, out, **more)
    return out


def steps(p: Any, dtype: torch.dtype) -> list[tuple[Any, torch.Tensor]]:
    """Both recurrences of the layer, with states of all slots."""
    channels, size = p["a"].shape
    h = torch.randn(SLOTS, channels, size).to(dtype)
    return [(scan, h), (conv, torch.randn(SLOTS, p["weight"].shape[1] - 1, channels).to(dtype))]


requests = st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=SLOTS)


@isas
@settings(max_examples=60, deadline=None)
@given(
    requests=requests, channels=st.integers(1, 40), size=st.sampled_from([1, 8, 16, 33]),
    width=st.integers(2, 5), dtype=st.sampled_from(list(NEAR)), wide=st.booleans(),
    seed=st.integers(0, 99), nowhere=st.booleans(),
)  # fmt: skip
def test_equals_the_definition(
    isa: str, requests: Any, channels: int, size: int, width: int, dtype: torch.dtype, wide: bool,
    seed: int, nowhere: bool,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    p = parameters(channels, size, width)
    lengths, has = ([r[i] for r in requests] for i in (0, 1))
    slots = torch.randperm(SLOTS)[: len(lengths)].tolist()
    if nowhere:
        slots[0] = -1
    b, t = batch(lengths, slots, has), tokens(sum(lengths), channels, size, dtype)
    near = {"atol": NEAR[dtype], "rtol": NEAR[dtype]}
    for step, states in steps(p, torch.float32 if wide else dtype):
        theirs, ours = states.clone(), states.clone()
        expected = step(reference, p, t, theirs, b)
        got = step(cpu, p, t, ours, b, isa=isa)
        torch.testing.assert_close(got, expected, **near)
        torch.testing.assert_close(ours, theirs, **near)
        others = [i for i in range(SLOTS) if i not in slots]
        assert torch.equal(ours[others], states[others])


@isas
@settings(max_examples=30, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 29), max_size=4, unique=True), dtype=st.sampled_from(list(NEAR))
)
def test_chunks_are_the_whole(isa: str, cuts: list[int], dtype: torch.dtype) -> None:
    """To the bit, for states are kept in float32; but a lone token adds up in another order."""
    torch.manual_seed(0)
    p, t = parameters(24, 16, 4), tokens(30, 24, 16, dtype)
    for step, states in steps(p, torch.float32):
        whole, parts = states.clone(), states.clone()
        expected = step(cpu, p, t, whole, batch([30], [2], [False]), isa=isa)
        ends = [0, *sorted(cuts), 30]
        got = [
            step(
                cpu, p, {k: v[a:b] for k, v in t.items()}, parts, batch([b - a], [2], [a > 0]),
                isa=isa,
            )
            for a, b in pairwise(ends)
        ]  # fmt: skip
        near = NEAR[dtype] if min(b - a for a, b in pairwise(ends)) == 1 else 0
        torch.testing.assert_close(torch.cat(got), expected, atol=near, rtol=near)
        torch.testing.assert_close(parts, whole, atol=near, rtol=near)


@isas
@pytest.mark.parametrize("value", [60.0, -60.0, 1e4, -1e4, torch.inf, torch.nan])
def test_extremes_are_the_definitions(isa: str, value: float) -> None:
    """Steps whose softplus is themselves or zero, whose decay underflows, and what is no number."""
    torch.manual_seed(0)
    p, t = parameters(20, 16, 4), tokens(3, 20, 16, torch.float32)
    t["dt"][1] = value
    t["gate"][1, ::2] = value
    states, b = torch.randn(SLOTS, 20, 16), batch([3], [1], [True])
    theirs, ours = states.clone(), states.clone()
    expected = scan(reference, p, t, theirs, b)
    got = scan(cpu, p, t, ours, b, isa=isa)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_without_bias_and_gate() -> None:
    torch.manual_seed(0)
    p, t = parameters(20, 16, 4), tokens(6, 20, 16, torch.float32)
    p["bias"] = t["gate"] = None
    b = batch([6], [1], [True])
    for step, states in steps(p, torch.float32):
        expected = step(reference, p, t, states.clone(), b)
        torch.testing.assert_close(
            step(cpu, p, t, states.clone(), b), expected, atol=1e-5, rtol=1e-5
        )


def test_threads_change_nothing() -> None:
    torch.manual_seed(0)
    p, t = parameters(100, 16, 4), tokens(40, 100, 16, torch.bfloat16)
    b = batch([1, 39], [1, 3], [True, False])
    for step, states in steps(p, torch.float32):
        one = step(cpu, p, t, states.clone(), b, num_threads=1)
        assert torch.equal(step(cpu, p, t, states.clone(), b, num_threads=2), one)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(4, 19)}, r"x: \(4, 19\), not"),
        ({"x": torch.zeros(3, 20)}, "x: 3 rows for 4 tokens"),
        ({"x": torch.zeros(20, 4).T}, "x: a row is not contiguous"),
        ({"x": torch.zeros(4, 20, dtype=torch.float64)}, "x: torch.float64 is not"),
        ({"a": torch.zeros(20, 257)}, "257 states of a channel"),
        ({"a": torch.zeros(20, 16, dtype=torch.bfloat16)}, "a: contiguous float32"),
        ({"weight": torch.zeros(20, 9)}, "width 9 is not within 2..8"),
        ({"weight": torch.zeros(20, 3)}, r"states: \(3, 20\), not \(2, 20\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changed: dict[str, Any], message: str) -> None:
    p, t = parameters(20, 16, 4), tokens(4, 20, 16, torch.float32)
    p, t = {**p, **changed}, {**t, **changed}
    (_, h), (_, seen) = steps(parameters(20, 16, 4), torch.float32)

    def both() -> None:
        conv(cpu, p, t, seen, batch([4], [0], [True]))
        scan(cpu, p, t, h, batch([4], [0], [True]))

    with pytest.raises(ValueError, match=message):
        both()


def test_a_slot_beyond_the_states_is_refused() -> None:
    p, t = parameters(20, 16, 4), tokens(4, 20, 16, torch.float32)
    (_, h), _ = steps(p, torch.float32)
    with pytest.raises(ValueError, match="slot 5 of 5"):
        scan(cpu, p, t, h, batch([4], [5], [True]))
