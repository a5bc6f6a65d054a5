"""Value merging: dropped tokens' values in the kept ones, from the definition, token by token."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_policies.step.merge import _nearest, merge_values
from tests.cache_policies.worker import KV_HEADS, Text, Worker


def by_definition(
    key: torch.Tensor,
    value: torch.Tensor,
    there: torch.Tensor,
    kept: torch.Tensor,
    chosen: torch.Tensor | None = None,
) -> torch.Tensor:
    """``chosen``: ``[heads, n]``, to which place each token goes; it must be among the nearest."""
    out = torch.zeros(*kept.shape, key.shape[2], dtype=torch.float64)
    for head in range(key.shape[0]):
        places = [(place, int(token)) for place, token in enumerate(kept[head]) if token >= 0]
        parts = {place: [(math.e, value[head, token])] for place, token in places}
        stay = {token for _, token in places}
        for token in range(key.shape[1]):
            if token in stay or not there[head, token]:
                continue
            cosine = torch.cosine_similarity
            like = {p: float(cosine(key[head, token], key[head, t], dim=0)) for p, t in places}
            best = max(like, key=lambda place: like[place])
            if chosen is not None:
                assert like[int(chosen[head, token])] >= like[best] - 1e-6
                best = int(chosen[head, token])
            parts[best].append((math.exp(like[best]), value[head, token]))
        for place, members in parts.items():
            total = sum(w for w, _ in members)
            out[head, place] = sum(w * v.double() for w, v in members) / total
    return out


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_values_are_those_of_the_definition(data: st.DataObject) -> None:
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    heads, count = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    key, value = (torch.randn(heads, count, 8, generator=rng) for _ in "kv")
    if data.draw(st.booleans()):  # the same key in several places
        key[:, data.draw(st.integers(1, 4)) - 1 :: data.draw(st.integers(1, 4))] = key[
            :, :1
        ].clone()
    there = torch.rand(heads, count, generator=rng) > data.draw(st.sampled_from((-1, 0.3)))
    there[:, -1] = True
    target = data.draw(st.integers(1, count))
    kept = torch.full((heads, target), -1)
    for head in range(heads):
        own = there[head].nonzero().flatten()[-target:]
        kept[head, target - len(own) :] = own
    merged, (chosen, _) = merge_values(key, value, there, kept), _nearest(key, kept)
    # Copies of a key that are dropped may go to any kept one; all of each goes to one of them.
    expected = by_definition(key, value, there, kept, chosen)
    torch.testing.assert_close(merged.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("codec", ["raw", "kivi-4bit"])
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize(
    ("method", "prompt"),
    [
        ("knorm(budget=150)", 500),
        ("snapkv(budget=300,heads=adaptive)", 500),
        ("snapkv(budget=384,heads=adaptive)", 512),  # a head may hold all of them
    ],
)
def test_pages_hold_merged_values_and_the_same_keys(
    method: str, prompt: int, codec: str, caching: bool
) -> None:
    text = Text(600)
    held = {}
    for merge in ("nothing", "values"):
        worker = Worker(codec, caching=caching)
        sequence = worker.start(text, method.replace(")", f",merge={merge})"), prompt)
        worker.run(sequence, [random.Random(4).randrange(100, 400)])
        worker.run(sequence, [prompt - sequence.computed])
        place = worker.positions(sequence)
        held[merge] = (*(x[place >= 0] for x in worker.held(sequence)), place)
    for plain, merged in zip(held["nothing"][::2], held["values"][::2], strict=True):
        assert torch.equal(plain, merged), "keys or positions differ"
    assert not torch.equal(held["nothing"][1], held["values"][1])
    if codec == "raw" and "adaptive" not in method:
        key, value = (x[:prompt].transpose(0, 1) for x in (text.key, text.value))
        there = torch.ones(KV_HEADS, prompt, dtype=torch.bool)
        expected = by_definition(key, value, there, held["values"][2].long())
        found = held["values"][1].double().view_as(expected)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_repeated_cuts_stay_finite_and_bounded() -> None:
    text = Text(900)
    worker = Worker("kivi-4bit")
    sequence = worker.start(text, "h2o(heavy=60,recent=60,interval=8,merge=values)", 300)
    worker.run(sequence, [300, *[1] * 60])
    _, value = worker.held(sequence)
    assert value.isfinite().all()
    assert value.abs().max() <= text.value.abs().max() * 1.1, "means cannot grow"
    assert value.shape[0] == KV_HEADS
    assert 120 <= value.shape[1] < 128
