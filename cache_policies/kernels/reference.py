"""The oracle: plain torch, one sequence at a time, every stored token decoded to float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cache_policies.pages.codecs.packing import LANES, to_half
from cache_policies.pages.plan import Plan

if TYPE_CHECKING:
    from cache_policies.kernels.contract import Batch, Mass, Reads, Shape
    from cache_policies.pages.layout import PageLayout


class ReferenceKernel:
    """Reads as the definition; slow."""

    name = "reference"
    packing = LANES  # what it takes by default; any is read

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
        mass: Mass | None = None,
        reads: Reads | None = None,
    ) -> None:
        for seq in range(batch.num_seqs):
            span = _span(batch, seq)
            keys, values = self._held(pages, batch, seq, key, value)
            mask = self._visible(batch, seq, keys.shape[1], reads)
            weights = self._weights(query[span].float(), keys, mask)
            values = values.repeat_interleave(self._group, 0)
            output[span] = (weights @ values).transpose(0, 1).to(output.dtype)
            if mass is not None:
                self._count(weights, int(batch.stored[seq]), seq, mass)

    def append(
        self, pages: torch.Tensor, batch: Batch, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        for seq in range(batch.num_seqs):
            first, count = int(batch.query_start[seq]), int(batch.appended[seq])
            if not count:
                continue
            span = slice(first, first + count)
            pending = self._pending(pages, batch, seq, key[span], value[span])
            stored, after = int(batch.stored[seq]), int(batch.stored_after[seq])
            absorbed = after - stored
            self._write_store(pages, batch, seq, stored, *(x[:, :absorbed] for x in pending))
            rest = torch.cat(pending, -1)[:, absorbed:]
            self._write_ring(pages, batch.block_table[seq], rest)

    def read(
        self,
        pages: torch.Tensor,
        batch: Batch,
        key: torch.Tensor,
        value: torch.Tensor,
        index: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        held = self._held(pages, batch, 0, key, value)
        if index is None:
            return held
        at = index.long()[..., None].expand(-1, -1, self.layout.head_size)
        return held[0].gather(1, at), held[1].gather(1, at)

    def write(
        self,
        pages: torch.Tensor,
        batch: Batch,
        index: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> None:
        stored, held = int(batch.stored[0]), int(batch.stored[0] + batch.ring[0])
        fresh = key.new_empty(0, *key.shape[::2])
        both = torch.cat(self._held(pages, batch, 0, fresh, fresh), -1)
        for head, row in enumerate(index.long()):
            real = row >= 0
            both[head, row[real]] = torch.cat([key, value], -1)[head, real]
        parts = both.split(self.layout.head_size, -1)
        self._write_store(pages, batch, 0, 0, *(x[:, :stored] for x in parts))
        self._write_ring(pages, batch.block_table[0], both[:, stored:held])

    @property
    def _group(self) -> int:
        return self.shape.num_heads // self.shape.num_kv_heads

    def _held(
        self, pages: torch.Tensor, batch: Batch, seq: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All tokens of a request, ``[num_kv_heads, tokens, head_size]``."""
        span = _span(batch, seq)
        stored = self._stored(pages, batch, seq)
        pending = self._pending(pages, batch, seq, key[span], value[span])
        return torch.cat([stored[0], pending[0]], 1), torch.cat([stored[1], pending[1]], 1)

    def _stored(
        self, pages: torch.Tensor, batch: Batch, seq: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        parts, left = [], int(batch.stored[seq])
        for page in batch.block_table[seq, int(batch.store_row[seq]) :]:
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
        """Ring tokens followed by the given ones, ``[num_kv_heads, tokens, head_size]``."""
        head_size, count = self.layout.head_size, int(batch.ring[seq])
        row = batch.block_table[seq, : self.plan.ring_pages]
        ring = [self.layout.ring_view(pages[page]) for page in row]
        recent = torch.cat(ring, 1)[:, :count].float() if count else None
        fresh = torch.cat([key, value], -1).transpose(0, 1).float()
        both = fresh if recent is None else torch.cat([recent, fresh], 1)
        return both[..., :head_size], both[..., head_size:]

    def _write_store(
        self,
        pages: torch.Tensor,
        batch: Batch,
        seq: int,
        first: int,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> None:
        row = batch.block_table[seq, int(batch.store_row[seq]) :]
        done, size = 0, self.plan.page_tokens
        while done < key.shape[1]:
            page, slot = divmod(first + done, size)
            span = slice(done, done + min(size - slot, key.shape[1] - done))
            views = self.layout.views(pages[row[page]])
            self.layout.codec.write(views, slot, key[:, span], value[:, span])
            done = span.stop

    def _write_ring(self, pages: torch.Tensor, row: torch.Tensor, rest: torch.Tensor) -> None:
        if self.layout.ring_dtype == torch.float16:
            rest = to_half(rest)
        for start in range(0, rest.shape[1], self.layout.ring_tokens):
            part = rest[:, start : start + self.layout.ring_tokens]
            view = self.layout.ring_view(pages[row[start // self.layout.ring_tokens]])
            view[:, : part.shape[1]] = part.to(view.dtype)

    def _visible(self, batch: Batch, seq: int, total: int, reads: Reads | None) -> torch.Tensor:
        """Mask ``[num_kv_heads, fresh, total]``; the last tokens are causal."""
        fresh = int(batch.query_start[seq + 1] - batch.query_start[seq])
        causal = torch.ones(fresh, total, dtype=torch.bool).tril(total - fresh)
        mask = causal.repeat(self.shape.num_kv_heads, 1, 1)
        if reads is None or int(reads.count[seq, 0]) < 0:
            return mask
        page = torch.arange(int(batch.stored[seq])) // self.plan.page_tokens
        for head in range(self.shape.num_kv_heads):
            chosen = reads.pages[seq, head, : int(reads.count[seq, head])]
            mask[head, :, : len(page)] &= torch.isin(page, chosen)
        return mask

    def _weights(self, query: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """``[n, heads, d]`` against ``[kv heads, tokens, d]`` -> ``[heads, n, tokens]``."""
        keys, mask = (x.repeat_interleave(self._group, 0) for x in (keys, mask))
        scores = query.transpose(0, 1) @ keys.transpose(1, 2) * self.shape.scale
        return scores.masked_fill(~mask, float("-inf")).softmax(-1)

    def _count(self, weights: torch.Tensor, stored: int, seq: int, mass: Mass) -> None:
        out = mass.out[seq]
        if out is None:
            return
        counted = weights[:, int(mass.first_query[seq]) :].sum(1).unflatten(0, (-1, self._group))
        page = int(mass.first_token[seq]) // self.plan.page_tokens
        first = min(page * self.plan.page_tokens, stored)
        out[:, first : weights.shape[2]] += counted.sum(1)[:, first:]


def _span(batch: Batch, seq: int) -> slice:
    return slice(int(batch.query_start[seq]), int(batch.query_start[seq + 1]))
