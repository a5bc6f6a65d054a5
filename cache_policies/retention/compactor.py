"""Compactor: keys that the others do not span, and what nearby queries look at.

Source: Chari and Van Durme, "Compactor: Calibrated Query-Agnostic KV Cache Compression with
Approximate Leverage Scores", arXiv 2507.08143. Two scores of every token, each standardized over
the text, are added: the leverage score of its key before rotary embedding (of the centred keys,
through a random projection), and the probability mass that queries of the same ``chunk`` tokens
give it without a causal mask, times the norm of its value. No question is looked at, so what is
kept serves any that follows. The projection is drawn from the layer's number, so all ranks and a
request that starts over draw the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn import functional

from cache_policies.errors import PolicyError
from cache_policies.retention.base import Budgeted

if TYPE_CHECKING:
    from cache_policies.retention.seen import Seen

SKETCH = 48  # directions of the projection, as in the paper
RIDGE = 1e-4  # share of the mean eigenvalue, for keys that span fewer directions
NEIGHBOURS = 3
LONGEST_CHUNK = 4096  # every token attends to so many


@dataclass(frozen=True)
class Compactor(Budgeted):
    """Tokens with keys unlike the others' combinations, and with attention nearby.

    Attributes:
        budget: tokens kept per KV head and layer.
        ratio: or their share of the prompt.
        sinks: first tokens of the text, always kept.
        window: last tokens of the prompt, always kept.
        blend: weight of the leverage score; that of attention is 1.
        chunk: tokens that attend to each other for the second score.

    """

    name: ClassVar[str] = "compactor"
    keeps: ClassVar[str] = "keys that others do not span, and what nearby queries attend to"
    loses: ClassVar[str] = "tokens whose keys are combinations of others'"
    NEEDS_EVERY_QUERY: ClassVar[bool] = True
    UNROTATES: ClassVar[bool] = True

    sinks: int = 8
    window: int = 4
    blend: float = 0.35
    chunk: int = 256

    def check(self) -> None:
        super().check()
        if not 0 <= self.blend <= 1000:
            raise PolicyError(f"blend={self.blend} is not between 0 and 1000")
        if not 2 <= self.chunk <= LONGEST_CHUNK:
            raise PolicyError(f"chunk={self.chunk} is not between 2 and {LONGEST_CHUNK}")

    @property
    def chunk_tokens(self) -> int:
        return self.chunk

    def score(self, seen: Seen) -> torch.Tensor:
        leverage = _standardized(self._leverage(seen))
        return functional.pad(
            self.blend * leverage + _standardized(self._attention(seen)),
            (0, seen.position.shape[1] - seen.prompt),
        )

    def _leverage(self, seen: Seen) -> torch.Tensor:
        """``[num_kv_heads, prompt]``: how far each key lies outside what the others span."""
        assert seen.rope is not None
        position = torch.arange(seen.prompt, device=seen.position.device)
        plain = seen.rope.undo(seen.keys[:, : seen.prompt], position)
        size = plain.shape[-1]
        directions = min(SKETCH, size)
        sketch = _sketch(seen.layer, size, directions, plain.device)
        x = (plain - plain.mean(1, keepdim=True)) @ sketch
        gram = x.transpose(1, 2) @ x
        diagonal = gram.diagonal(dim1=1, dim2=2)
        diagonal += RIDGE * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny
        factor, _ = torch.linalg.cholesky_ex(gram)
        solved = torch.linalg.solve_triangular(factor, x.transpose(1, 2), upper=False)
        return solved.square().sum(1)

    def _attention(self, seen: Seen) -> torch.Tensor:
        """``[num_kv_heads, prompt]``: mass from the chunk's queries, weighted and smoothed."""
        assert seen.near is not None
        weighted = seen.near * seen.values[:, : seen.prompt].norm(dim=-1)
        return functional.avg_pool1d(weighted, NEIGHBOURS, 1, NEIGHBOURS // 2)


@lru_cache(maxsize=256)  # to copy it to a GPU waits for the GPU
def _sketch(layer: int, size: int, directions: int, device: torch.device) -> torch.Tensor:
    draw = torch.Generator().manual_seed(layer)
    sketch = torch.randn(size, directions, generator=draw, dtype=torch.float32)
    return (sketch / directions**0.5).to(device)


def _standardized(score: torch.Tensor) -> torch.Tensor:
    """Mean 0 and deviation 1 over the tokens of every head."""
    deviation = score.std(1, keepdim=True).clamp_min(1e-6)
    return (score - score.mean(1, keepdim=True)) / deviation
