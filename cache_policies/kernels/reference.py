"""The oracle: plain torch, one sequence at a time, every stored token decoded to float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cache_policies.codecs.packing import to_half
from cache_policies.plan import Plan

if TYPE_CHECKING:
    from cache_policies.kernels.contract import Batch, Shape
    from cache_policies.page import PageLayout


class ReferenceKernel:
    """Reads as the definition; slow."""

    name = "reference"

    def __init__(self, layout: PageLayout, shape: Shape) -> None:
        self.layout, self.shape, self.plan = layout, shape, Plan.of(layout)

    @classmethod
    def summary(cls) -> str:
        return "reference (plain torch, slow)"

    def attend(
        self,
        pages: torch.Tensor,
        batch: Batch,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        for seq in range(batch.num_seqs):
            span = _span(batch, seq)
            pending_key, pending_value = self._pending(pages, batch, seq, key, value)
            stored_key, stored_value = self._stored(pages, batch, seq)
            keys = torch.cat([stored_key, pending_key], 1)
            values = torch.cat([stored_value, pending_value], 1)
            output[span] = self._softmax(query[span].float(), keys, values).to(output.dtype)

    def append(
        self, pages: torch.Tensor, batch: Batch, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        for seq in range(batch.num_seqs):
            pending_key, pending_value = self._pending(pages, batch, seq, key, value)
            stored, after = int(batch.stored[seq]), int(batch.stored_after[seq])
            absorbed = after - stored
            row = batch.block_table[seq]
            self._write_store(
                pages, row, stored, pending_key[:, :absorbed], pending_value[:, :absorbed]
            )
            rest = torch.cat([pending_key, pending_value], -1)[:, absorbed:]
            self._write_ring(pages, row, rest)

    def _stored(
        self, pages: torch.Tensor, batch: Batch, seq: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        parts, left = [], int(batch.stored[seq])
        for page in batch.block_table[seq, self.plan.ring_pages :]:
            if left <= 0:
                break
            views = self.layout.views(pages[page])
            parts.append(self.layout.codec.read(views, min(left, self.plan.page_tokens)))
            left -= self.plan.page_tokens
        if not parts:
            empty = torch.zeros(self.shape.num_kv_heads, 0, self.layout.head_size)
            return empty, empty
        return torch.cat([k for k, _ in parts], 1), torch.cat([v for _, v in parts], 1)

    def _pending(
        self, pages: torch.Tensor, batch: Batch, seq: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ring tokens followed by the fresh ones, ``[num_kv_heads, tokens, head_size]``."""
        span, head_size = _span(batch, seq), self.layout.head_size
        count = int(batch.ring[seq])
        row = batch.block_table[seq, : self.plan.ring_pages]
        ring = [self.layout.ring_view(pages[page]) for page in row]
        recent = torch.cat(ring, 1)[:, :count].float() if count else None
        fresh = torch.cat([key[span], value[span]], -1).transpose(0, 1).float()
        both = fresh if recent is None else torch.cat([recent, fresh], 1)
        return both[..., :head_size], both[..., head_size:]

    def _write_store(
        self,
        pages: torch.Tensor,
        row: torch.Tensor,
        first: int,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> None:
        done, size = 0, self.plan.page_tokens
        while done < key.shape[1]:
            index, slot = self.plan.store_slot(first + done)
            span = slice(done, done + min(size - slot, key.shape[1] - done))
            views = self.layout.views(pages[row[index]])
            self.layout.codec.write(views, slot, key[:, span], value[:, span])
            done = span.stop

    def _write_ring(self, pages: torch.Tensor, row: torch.Tensor, rest: torch.Tensor) -> None:
        if self.layout.ring_dtype == torch.float16:
            rest = to_half(rest)
        for start in range(0, rest.shape[1], self.layout.ring_tokens):
            part = rest[:, start : start + self.layout.ring_tokens]
            view = self.layout.ring_view(pages[row[start // self.layout.ring_tokens]])
            view[:, : part.shape[1]] = part.to(view.dtype)

    def _softmax(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """``[n, heads, d]`` against ``[kv heads, tokens, d]``; the last n tokens are causal."""
        fresh, total = query.shape[0], keys.shape[1]
        mask = torch.ones(fresh, total, dtype=torch.bool).tril(total - fresh)
        group = self.shape.num_heads // self.shape.num_kv_heads
        keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
        scores = query.transpose(0, 1) @ keys.transpose(1, 2) * self.shape.scale
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        return (weights @ values).transpose(0, 1)


def _span(batch: Batch, seq: int) -> slice:
    return slice(int(batch.query_start[seq]), int(batch.query_start[seq + 1]))
