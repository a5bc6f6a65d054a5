"""Value merging: what a cut drops is added to the tokens that stay.

Every dropped token's value goes to the kept token of the head whose key is most similar to its own
(cosine). A kept value becomes the mean of its own and of those, weighted by the exponential of the
similarity (its own: 1); keys stay as they are. Source of the form: Wan et al., "D2O: Dynamic
Discriminative Operations for Efficient Long-Context Inference of Large Language Models",
arXiv 2406.13035. Differences: keys are not merged, and no threshold keeps a dropped value out.
"""

from __future__ import annotations

from math import e

import torch
from torch.nn import functional

AT_ONCE = 2**20  # similarities of all heads that are in memory together, and so in the cache
ROWS = 64  # of these at least: what a tile of kept keys is read for


def merge_values(
    key: torch.Tensor, value: torch.Tensor, there: torch.Tensor, kept: torch.Tensor
) -> torch.Tensor:
    """Values of the kept tokens with those of the dropped ones in them.

    Args:
        key: ``[num_kv_heads, n, head_size]`` float32 of all candidates.
        value: same shape.
        there: ``[num_kv_heads, n]`` bool, whether the head has the candidate.
        kept: ``[num_kv_heads, target]`` int64, the candidates that stay; below 0: none.

    Returns:
        ``[num_kv_heads, target, head_size]`` float32; zeros where ``kept`` is below 0.

    """
    nearest, similar = _nearest(key, kept)
    place = torch.arange(kept.shape[1], device=key.device).expand_as(kept)
    # A kept token goes to its own place, whatever else has the same key; a last column is for none.
    column = kept.masked_fill(kept < 0, key.shape[1])
    nearest = functional.pad(nearest, (0, 1)).scatter(1, column, place)[:, :-1]
    weight = functional.pad(similar.exp(), (0, 1)).scatter(1, column, e)[:, :-1] * there
    total = weight.new_zeros(kept.shape).scatter_add_(1, nearest, weight)
    index = nearest[..., None].expand_as(value)
    merged = torch.zeros_like(value[:, :1]).repeat(1, kept.shape[1], 1)
    merged.scatter_add_(1, index, value * weight[..., None])
    lacks = (kept < 0)[..., None]
    return (merged / total[..., None].masked_fill(lacks, 1)).masked_fill(lacks, 0)


def _nearest(key: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Place of the kept token most similar to each candidate, and the cosine, ``[heads, n]``."""
    unit = functional.normalize(key, dim=-1)
    stay = unit.gather(1, kept.clamp(min=0)[..., None].expand(-1, -1, key.shape[-1]))
    stay, lacks = stay.transpose(1, 2), (kept < 0)[:, None]
    columns = max(1, AT_ONCE // (len(key) * ROWS))
    tiles = range(0, kept.shape[1], columns)
    rows = max(ROWS, AT_ONCE // (len(key) * min(columns, kept.shape[1])))
    found = []
    for part in unit.split(rows, 1):
        place = torch.zeros(part.shape[:2], dtype=torch.int64, device=key.device)
        best = part.new_full(part.shape[:2], -torch.inf)
        for start in tiles:
            tile = slice(start, start + columns)
            similar = (part @ stay[..., tile]).masked_fill(lacks[..., tile], -torch.inf)
            like = similar.max(-1)
            place = torch.where(like.values > best, like.indices + start, place)
            best = torch.maximum(like.values, best)
        found.append((place, best))
    return torch.cat([p for p, _ in found], 1), torch.cat([b for _, b in found], 1)
