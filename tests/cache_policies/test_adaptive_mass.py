"""Budgets by head keep at least the attention that uniform ones keep, more where heads differ."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_policies.policy import parse_method
from cache_policies.retention.adaptive import Budgets
from cache_policies.retention.rope import Rope
from cache_policies.retention.seen import QueryStatistics, Seen

HEADS, GROUP, SIZE, PROMPT, PAGE = 4, 2, 32, 900, 16
ROPE = Rope(torch.cat([torch.ones(4096, SIZE // 2), torch.zeros(4096, SIZE // 2)], 1), SIZE)
SNAPKV, EXPECTED = "snapkv(budget={},kernel=1)", "expected-attention(budget={})"


def _score(heads: int, count: int, seed: int) -> torch.Tensor:
    """Shares of attention of heads that look at few tokens or at many."""
    rng = torch.Generator().manual_seed(seed)
    sharpness = torch.rand(heads, 1, generator=rng) * 6
    return (torch.randn(heads, count, generator=rng) * sharpness).softmax(-1)


@settings(max_examples=200, deadline=None)
@given(
    heads=st.integers(1, 8),
    keep=st.integers(1, 200),
    more=st.integers(0, 300),
    page=st.sampled_from([1, 4, 16, 128]),
    must=st.integers(0, 40),
    seed=st.integers(0, 999),
)
def test_no_less_is_kept_than_by_uniform_heads(
    heads: int, keep: int, more: int, page: int, must: int, seed: int
) -> None:
    """Whole pages and the safeguard cost a part of the gain, but never more than all of it."""
    share = _score(heads, keep + more, seed)
    score = share.clone()
    score[:, -min(must, keep) :] = torch.inf if must else score
    kept = Budgets.of(heads, keep, keep + more, page).select(score)
    mass = share.gather(1, kept.clamp(min=0)).masked_fill(kept < 0, 0).sum()
    uniform = share.gather(1, score.topk(keep, 1).indices).sum()
    assert mass >= uniform - 1e-5


def _seen(sharpness: torch.Tensor, seed: int) -> tuple[Seen, torch.Tensor]:
    """A prompt whose heads look at tokens the more sharply; and what later queries look at."""
    rng = torch.Generator().manual_seed(seed)
    mean = torch.randn(HEADS * GROUP, 1, SIZE, generator=rng)
    query = mean + torch.randn(HEADS * GROUP, PROMPT + 64, SIZE, generator=rng) * 0.3
    key = torch.randn(HEADS, PROMPT, SIZE, generator=rng) * sharpness[:, None, None]
    value = torch.nn.functional.normalize(torch.randn(HEADS, PROMPT, SIZE, generator=rng), dim=-1)
    logits = query.unflatten(0, (HEADS, GROUP)) @ key[:, None].transpose(2, 3) * SIZE**-0.5
    attention = logits.softmax(-1)
    queries = QueryStatistics(ROPE, SIZE**-0.5)
    queries.add(query[:, :PROMPT].transpose(0, 1), 0)
    seen = Seen(
        position=torch.arange(PROMPT).expand(HEADS, -1),
        mass=attention[:, :, PROMPT - 32 : PROMPT].sum((1, 2)),
        end=PROMPT, prompt=PROMPT, layer=0, layers=1, load=lambda: (key, value),
        queries=queries, scale=SIZE**-0.5, rope=ROPE,
    )  # fmt: skip
    return seen, attention[:, :, PROMPT:].mean((1, 2))


def _kept(method: str, keep: int, seen: Seen, later: torch.Tensor) -> tuple[float, float]:
    """Mean share of later queries' attention, under uniform and under adaptive heads."""
    retention = parse_method(method.format(keep)).retention
    assert retention is not None
    uniform = later.gather(1, retention.select(seen, keep)).sum(1).mean()
    budgets = Budgets.of(HEADS, keep, PROMPT, PAGE)
    kept = retention.select(seen, keep, budgets)
    assert (kept >= 0).sum() == HEADS * keep
    adaptive = later.gather(1, kept.clamp(min=0)).masked_fill(kept < 0, 0).sum(1).mean()
    return float(uniform), float(adaptive)


@pytest.mark.parametrize("method", [SNAPKV, EXPECTED])
@settings(max_examples=25, deadline=None)
@given(keep=st.sampled_from([112, 225, 450]), seed=st.integers(0, 999))
def test_later_queries_find_more_where_heads_differ(method: str, keep: int, seed: int) -> None:
    """A head that looks at all tokens alike beside ever sharper ones, at 8x, 4x and 2x."""
    seen, later = _seen(torch.tensor([0.05, 0.5, 2.0, 4.0]), seed)
    uniform, adaptive = _kept(method, keep, seen, later)
    assert adaptive > uniform


@pytest.mark.parametrize("method", [SNAPKV, EXPECTED])
@settings(max_examples=25, deadline=None)
@given(keep=st.sampled_from([112, 225, 450]), seed=st.integers(0, 999))
def test_later_queries_find_as_much_where_heads_are_alike(
    method: str, keep: int, seed: int
) -> None:
    seen, later = _seen(torch.ones(HEADS), seed)
    uniform, adaptive = _kept(method, keep, seen, later)
    assert adaptive > uniform - 0.002
