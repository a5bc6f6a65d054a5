"""The methods once more, from their definitions, on whole tensors: what ``Step`` must keep.

Every function takes a text (queries ``[n, heads, d]``, keys and values ``[n, kv heads, d]``)
and returns a mask ``[kv heads, n]`` of the tokens kept after the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from tests.cache_policies.worker import HEADS, KV_HEADS, SCALE, SIZE, THETA, Text

GROUP = HEADS // KV_HEADS
Choose = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


def attention(text: Text, n: int) -> torch.Tensor:
    """Causal probabilities ``[kv heads, group, n, n]``."""
    query = text.query[:n].unflatten(1, (KV_HEADS, GROUP)).permute(1, 2, 0, 3)
    key = text.key[:n].permute(1, 2, 0)[:, None]
    causal = torch.ones(n, n).tril().bool()
    return (query @ key * SCALE).masked_fill(~causal, -torch.inf).softmax(-1)


def _best(score: torch.Tensor, always: torch.Tensor, keep: int) -> torch.Tensor:
    kept = torch.zeros(KV_HEADS, score.shape[-1], dtype=torch.bool)
    for head in range(KV_HEADS):
        order = sorted(
            range(score.shape[-1]), key=lambda t: (bool(always[t]), float(score[head, t]))
        )
        kept[head, order[-keep:]] = True
    return kept


def adaptive(score: torch.Tensor, always: torch.Tensor, keep: int, page: int = 128) -> torch.Tensor:
    """Ada-KV (arXiv 2407.11550) a page at a time, each to the head in which it is worth most.

    Every head begins with what fills no page of a uniform head, a page, a fifth of the uniform
    budget, and ``always``.
    """
    order = [
        sorted(range(score.shape[1]), key=lambda t: (bool(always[t]), float(row[t])), reverse=True)
        for row in score
    ]
    tail, least = keep % page, max(0.2 * keep, int(always.sum()), keep % page + page)
    held = [tail + page * math.ceil((least - tail) / page) for _ in order]
    while sum(held) < keep * len(order):
        worth = [float(row[o[n : n + page]].sum()) if n + page <= len(o) else -1.0
                 for row, o, n in zip(score, order, held, strict=True)]  # fmt: skip
        held[max(range(len(held)), key=worth.__getitem__)] += page
    kept = torch.zeros_like(score, dtype=torch.bool)
    for head, count in enumerate(held):
        kept[head, order[head][:count]] = True
    return kept


def _edges(n: int, sinks: int, window: int) -> torch.Tensor:
    return torch.tensor([t < sinks or t >= n - window for t in range(n)])


def snapkv(
    text: Text, n: int, keep: int, window: int = 32, kernel: int = 5, choose: Choose = _best
) -> torch.Tensor:
    mean = attention(text, n)[:, :, -window:].mean(2)[..., : n - window]
    padded = torch.nn.functional.pad(mean, (kernel // 2, kernel // 2))
    pooled = padded.unfold(-1, kernel, 1).mean(-1).mean(1)
    score = torch.cat([pooled, torch.zeros(KV_HEADS, window)], 1)
    return choose(score, _edges(n, 0, window), keep)


def tova(text: Text, n: int, keep: int) -> torch.Tensor:
    score = attention(text, n)[:, :, -1].mean((0, 1))
    return _best(score.expand(KV_HEADS, -1), _edges(n, 0, 1), keep)


def h2o(text: Text, n: int, heavy: int, recent: int, choose: Choose = _best) -> torch.Tensor:
    return choose(attention(text, n).sum((1, 2)), _edges(n, 0, recent), heavy + recent)


def keydiff(text: Text, n: int, keep: int) -> torch.Tensor:
    key = text.key[:n].transpose(0, 1)
    unit = key / key.norm(dim=-1, keepdim=True)
    mean = unit.mean(1, keepdim=True)
    score = -torch.nn.functional.cosine_similarity(key, mean, dim=-1)
    return _best(score, _edges(n, 4, 32), keep)


def knorm(text: Text, n: int, keep: int) -> torch.Tensor:
    return _best(-text.key[:n].transpose(0, 1).norm(dim=-1), _edges(n, 4, 32), keep)


def streaming(n: int, sinks: int, window: int) -> torch.Tensor:
    return _edges(n, sinks, window).expand(KV_HEADS, -1)


def _turn(position: float) -> torch.Tensor:
    """Rotation matrix of one position."""
    turn = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    for i in range(SIZE // 2):
        angle = position * THETA ** (-2 * i / SIZE)
        a, b = i, i + SIZE // 2
        turn[a, a] = turn[b, b] = math.cos(angle)
        turn[a, b], turn[b, a] = -math.sin(angle), math.sin(angle)
    return turn


def expected_attention(
    text: Text, n: int, keep: int, future: int = 512, choose: Choose = _best
) -> torch.Tensor:
    """From the definition: 4 sinks are no part of it, neither their queries nor their keys."""
    sinks = 4
    mean_turn = torch.stack([_turn(n + ahead) for ahead in range(future)]).mean(0)
    score = torch.full((KV_HEADS, n), torch.inf, dtype=torch.float64)
    for kv_head in range(KV_HEADS):
        keys = text.key[sinks:n, kv_head].double()
        expected = torch.zeros(n - sinks, dtype=torch.float64)
        for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
            queries = [_turn(t).T @ text.query[t, head].double() for t in range(sinks, n)]
            plain = torch.stack(queries)
            mu = mean_turn @ plain.mean(0)
            sigma = mean_turn @ torch.cov(plain.T, correction=0) @ mean_turn.T
            exponent = [k @ mu / math.sqrt(SIZE) + k @ sigma @ k / (2 * SIZE) for k in keys]
            expected += torch.stack(exponent).softmax(0) / GROUP
        score[kv_head, sinks:] = expected * text.value[sinks:n, kv_head].double().norm(dim=-1)
    return choose(score, _edges(n, sinks, 1), keep)


def r_kv(
    text: Text, n: int, keep: int, balance: float = 0.1, window: int = 8, kernel: int = 7
) -> torch.Tensor:
    """Row by row of the similarities, token by token of the pooling."""
    past = n - window
    score = torch.zeros(KV_HEADS, n, dtype=torch.float64)
    for head in range(KV_HEADS):
        keys = text.key[:n, head].double()
        seen = torch.zeros(past, dtype=torch.float64)
        for t in range(past, n):
            group = text.query[t, head * GROUP : (head + 1) * GROUP].double()
            seen += (group @ keys[:past].T * SCALE).max(0).values.softmax(0) / window
        near = [seen[max(0, t - kernel // 2) : t + kernel // 2 + 1].max() for t in range(past)]
        like = torch.nn.functional.cosine_similarity(keys[:, None], keys[None], dim=-1)
        like.fill_diagonal_(0)
        for row in like:
            repeated = (row > 0.5).nonzero()
            if len(repeated):
                row[repeated[-1]] = 0
        redundant = like.mean(0).softmax(0)
        score[head, :past] = balance * torch.stack(near) - (1 - balance) * redundant[:past]
    return _best(score, _edges(n, 0, window), keep)


def compactor(text: Text, n: int, keep: int, blend: float = 0.35, chunk: int = 256) -> torch.Tensor:
    """Leverage by least squares: the diagonal of ``X X^+``; attention query by query."""
    score = torch.zeros(KV_HEADS, n, dtype=torch.float64)
    sketch = torch.randn(SIZE, 48, generator=torch.Generator().manual_seed(0)).double() / 48**0.5
    for head in range(KV_HEADS):
        keys = text.key[:n, head].double()
        plain = torch.stack([_turn(t).double().T @ k for t, k in enumerate(keys)])
        x = (plain - plain.mean(0)) @ sketch
        inverse = torch.linalg.pinv(x)
        leverage = torch.stack([x[t] @ inverse[:, t] for t in range(n)])
        mass = torch.zeros(n, dtype=torch.float64)
        for t in range(n):
            own = slice(t // chunk * chunk, min(n, t // chunk * chunk + chunk))
            for query in text.query[t, head * GROUP : (head + 1) * GROUP].double():
                mass[own] += (keys[own] @ query * SCALE).softmax(0) / GROUP
        mass *= text.value[:n, head].double().norm(dim=-1)
        padded = torch.cat([mass.new_zeros(1), mass, mass.new_zeros(1)])
        smooth = (padded[:-2] + padded[1:-1] + padded[2:]) / 3
        parts = [(part - part.mean()) / part.std() for part in (leverage, smooth)]
        score[head] = blend * parts[0] + parts[1]
    return _best(score, _edges(n, 8, 4), keep)


def lagkv(text: Text, n: int, keep: int, lag: int = 128, sinks: int = 4) -> torch.Tensor:
    always = torch.ones(n, dtype=torch.bool)
    score = torch.zeros(KV_HEADS, n)
    chunks = (n - sinks) // lag
    for chunk in range(chunks - 1):
        span = slice(sinks + chunk * lag, sinks + (chunk + 1) * lag)
        after = slice(span.stop, span.stop + lag)
        always[span] = False
        for head in range(KV_HEADS):
            total = torch.zeros(lag)
            for x in (text.key[:, head], text.value[:, head]):
                low, high = x[after].min(0).values, x[after].max(0).values
                total += ((x[span] - low) / (high - low)).std(1).softmax(0)
            score[head, span] = total.argsort().argsort().float()
    return _best(score, always, keep)
