"""Attention without a causal mask inside chunks of a prompt, for methods that ask for it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

AT_ONCE = 2**25  # probabilities in memory together; a request may ask for long chunks


@dataclass
class NearAttention:
    """Mass that every token of a prompt gets from the queries of its own chunk.

    Chunks are of the text, whatever the steps that compute it.

    Attributes:
        chunk: tokens of a chunk.
        scale: factor of the attention scores.
        query: ``[n, num_heads, head_size]`` float32 of the chunk that is not complete.
        key: ``[n, num_kv_heads, head_size]`` float32 of it.
        done: ``[num_kv_heads, tokens]`` of the complete ones.

    """

    chunk: int
    scale: float
    query: torch.Tensor | None = None
    key: torch.Tensor | None = None
    done: list[torch.Tensor] = field(default_factory=list)

    def add(self, query: torch.Tensor, key: torch.Tensor) -> None:
        """The next tokens of the prompt: ``[n, heads, head_size]``, after rotary embedding."""
        query, key = query.float(), key.float()
        if self.query is not None and self.key is not None:
            query, key = torch.cat([self.query, query]), torch.cat([self.key, key])
        whole = query.shape[0] // self.chunk * self.chunk
        if whole:
            self.done.append(self._mass(query[:whole], key[:whole], self.chunk))
        self.query, self.key = query[whole:].clone(), key[whole:].clone()

    def total(self) -> torch.Tensor:
        """``[num_kv_heads, tokens so far]`` float32, the mean over the query heads of a KV head."""
        assert self.query is not None
        assert self.key is not None
        left = self.query.shape[0]
        rest = [self._mass(self.query, self.key, left)] if left else []
        return torch.cat([*self.done, *rest], 1)

    def _mass(self, query: torch.Tensor, key: torch.Tensor, chunk: int) -> torch.Tensor:
        kv_heads = key.shape[1]
        rows = max(1, AT_ONCE // (query.shape[0] * query.shape[1]))
        query = query.transpose(0, 1).unflatten(1, (-1, chunk)).unflatten(0, (kv_heads, -1))
        key = key.transpose(0, 1).unflatten(1, (-1, chunk)).transpose(2, 3)[:, None]
        parts = ((part @ key * self.scale).softmax(-1).sum(3) for part in query.split(rows, 3))
        nothing = torch.zeros((), device=query.device, dtype=torch.float32)
        return sum(parts, start=nothing).mean(1).flatten(1)
