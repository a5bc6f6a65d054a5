"""What a retention method may look at when tokens must go."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from cache_policies.retention.rope import Rope


@dataclass(frozen=True)
class Seen:
    """What a method may look at when tokens must go: one request in one layer.

    Attributes:
        position: ``[num_kv_heads, n]`` int64, position in the text of every candidate; below 0
            where a head has none.
        mass: ``[num_kv_heads, n]`` float32, probability mass that each candidate got from the
            queries the method asked for, summed over them and over the query heads of the KV
            head; zeros for a method that asked for none.
        end: tokens computed so far; candidates lie before it.
        prompt: tokens of the prompt.
        layer: index of the layer.
        layers: number of layers.
        load: returns the candidates' keys and values, each ``[num_kv_heads, n, head_size]``
            float32. It reads the pages: call it only if they are needed.
        queries: statistics of the prompt's queries, for methods that set ``USES_QUERIES``.
        recent: ``[at most recent_queries, num_heads, head_size]`` float32, the last queries after
            rotary embedding, for methods that ask for some.
        scale: factor of the attention scores.
        rope: the model's rotary embedding.
        near: ``[num_kv_heads, prompt]`` float32, mass from the queries of the token's own chunk,
            for methods that set ``chunk_tokens``.

    """

    position: torch.Tensor
    mass: torch.Tensor
    end: int
    prompt: int
    layer: int
    layers: int
    load: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    queries: QueryStatistics | None = None
    recent: torch.Tensor | None = None
    scale: float = 1.0
    rope: Rope | None = None
    near: torch.Tensor | None = None

    @property
    def prompt_end(self) -> int:
        """End of the prompt so far: a request that starts over brings answer tokens along."""
        return min(self.end, self.prompt)

    @cached_property
    def _loaded(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.load()

    @property
    def keys(self) -> torch.Tensor:
        """``[num_kv_heads, n, head_size]`` float32, after rotary embedding."""
        return self._loaded[0]

    @property
    def values(self) -> torch.Tensor:
        """``[num_kv_heads, n, head_size]`` float32."""
        return self._loaded[1]


@dataclass
class QueryStatistics:
    """Running mean and covariance of a prompt's queries before rotary embedding.

    Attributes:
        rope: the model's rotary embedding.
        scale: factor of the attention scores.
        count: queries seen.
        total: ``[num_heads, head_size]``, their sum.
        square: ``[num_heads, head_size, head_size]``, sum of their outer products.

    """

    rope: Rope
    scale: float
    count: int = 0
    total: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float32))
    square: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float32))

    def add(self, query: torch.Tensor, first: int) -> None:
        """Count ``query`` ``[n, num_heads, head_size]``, rotated, at positions ``first ..``."""
        position = torch.arange(first, first + query.shape[0], device=query.device)
        plain = self.rope.undo(query.float().transpose(0, 1), position)
        self.count += query.shape[0]
        self.total = self.total + plain.sum(1)
        self.square = self.square + plain.transpose(1, 2) @ plain
