"""The oracle: plain torch, one sequence at a time, every stored token decoded to float32."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from cache_policies.kernels.contract import sampled
from cache_policies.kernels.counts import all_tokens, spans
from cache_policies.kernels.moves import move_rows
from cache_policies.pages.codecs.affine import AffineCodec
from cache_policies.pages.codecs.base import PAGE_STEP
from cache_policies.pages.codecs.packing import LANES, to_half
from cache_policies.pages.plan import Plan

if TYPE_CHECKING:
    from cache_policies.kernels.contract import Batch, Mass, Reads, Shape
    from cache_policies.kernels.moves import Moves
    from cache_policies.pages.layout import PageLayout


class ReferenceKernel:
    """Reads as the definition; slow."""

    name = "reference"
    packing = LANES  # what it takes by default; any is read

    def __init__(self, layout: PageLayout, shape: Shape) -> None:
        self.layout, self.shape, self.plan = layout, shape, Plan.of(layout)
        self._turned = layout.codec.turned
        self._offset = 0.0 if shape.key_offset is None else shape.key_offset[:, None]

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
            keys, values = self._held(pages, batch, seq, key[span], value[span])
            mask = self._visible(batch, seq, keys.shape[1], reads)
            weights = self._weights(self._turned(query[span].float()), keys, mask)
            values = values.repeat_interleave(self._group, 0)
            out = self._turned(weights @ values)
            output[span] = out.transpose(0, 1).to(output.dtype)
            if mass is not None and int(mass.place[seq]) >= 0:
                self._count(weights, int(batch.stored[seq]), seq, mass)

    def page_mass(
        self,
        pages: torch.Tensor,
        batch: Batch,
        query: torch.Tensor,
        key: torch.Tensor,
        blocks: torch.Tensor,
        samples: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        size, heads = self.plan.page_tokens, self.shape.num_kv_heads
        most = -(-int(batch.stored.max()) // size)
        mass = torch.zeros(len(blocks), heads, most, dtype=torch.float32)
        rest = mass.new_zeros(len(blocks), heads)
        for i, (seq, first, queries) in enumerate(blocks.tolist()):
            fresh = key[_span(batch, seq)]
            keys, _ = self._held(pages, batch, seq, fresh, fresh)
            mask = self._visible(batch, seq, keys.shape[1], None)
            rows = torch.tensor(sampled(first, queries, samples))
            chosen = query[int(batch.query_start[seq]) + rows].float()
            weights = self._weights(self._turned(chosen), keys, mask[:, rows])
            mean = weights.mean(1).unflatten(0, (heads, -1)).mean(1)  # [kv heads, tokens]
            stored = int(batch.stored[seq])
            page = torch.arange(stored) // size
            mass[i].index_add_(1, page, mean[:, :stored])
            rest[i] = 1 - mass[i].sum(1)
        return mass, rest

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
            self._write_ring(pages, batch, seq, rest)

    def read(
        self,
        pages: torch.Tensor,
        batch: Batch,
        key: torch.Tensor,
        value: torch.Tensor,
        index: torch.Tensor | None = None,
        start: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if index is None:
            numbers, start = all_tokens(batch.host)
            index = numbers.expand(self.shape.num_kv_heads, -1)
        ends, parts = spans(batch.host, index.shape[1], start), []
        for seq, (first, end) in enumerate(pairwise(ends)):
            span = _span(batch, seq, int(batch.appended[seq]))
            keys, values = self._held(pages, batch, seq, key[span], value[span])
            keys = self._turned(keys) + self._offset
            both = torch.cat([keys, self._turned(values)], -1)
            both = torch.cat([both, both.new_zeros(both.shape[0], 1, both.shape[2])], 1)
            at = index[:, first:end].long()
            at = torch.where(at < 0, both.shape[1] - 1, at)[..., None]
            parts.append(both.gather(1, at.expand(-1, -1, both.shape[2])))
        both = torch.cat(parts, 1)
        return both[..., : self.layout.head_size], both[..., self.layout.head_size :]

    def write(
        self,
        pages: torch.Tensor,
        batch: Batch,
        index: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        start: torch.Tensor | None = None,
    ) -> None:
        ends, new = spans(batch.host, index.shape[1], start), self._entered(key, value)
        for seq, (first, end) in enumerate(pairwise(ends)):
            if end > first:
                self._replace(pages, batch, seq, index[:, first:end], new[:, first:end])

    def move(
        self, pages: torch.Tensor, key: torch.Tensor, value: torch.Tensor, moves: Moves
    ) -> None:
        before = pages.clone()
        move_rows(self, pages, key, value, moves)
        codec = self.layout.codec
        if not isinstance(codec, AffineCodec) or not codec.groups_tokens:
            return
        for seq, (first, end) in enumerate(pairwise(moves.start.tolist())):
            for head, numbers in enumerate(moves.number[:, first:end]):
                self._copy_units(codec, before, pages, moves, (seq, head), numbers)

    def _copy_units(
        self,
        codec: AffineCodec,
        before: torch.Tensor,
        pages: torch.Tensor,
        moves: Moves,
        of: tuple[int, int],
        numbers: torch.Tensor,
    ) -> None:
        """Give whole units of a request and head their bytes of before."""
        size = self.plan.page_tokens
        unit = max(PAGE_STEP, codec.divisor)
        for to in range(0, min(len(numbers), int(moves.target.stored[of[0]])), unit):
            first = int(numbers[to])
            there = torch.arange(first, first + unit)
            ends = first + unit > int(moves.source.stored[of[0]])
            if first < 0 or first % unit or ends or not torch.equal(numbers[to : to + unit], there):
                continue
            runs = [
                x[self._run(batch, of, at // size)][None]
                for x, batch, at in ((before, moves.source, first), (pages, moves.target, to))
            ]
            source, target = (self.layout.views(run) for run in runs)
            codec.copy(source, first % size, target, to % size, unit)

    def _run(self, batch: Batch, of: tuple[int, int], page: int) -> tuple[int, int]:
        """Where the bytes of a request's head in a store page are."""
        row = int(batch.store_row[of[0]]) + page
        pages, places = _place(batch, of[0], row, self.shape.num_kv_heads)
        return int(pages[of[1]]), int(places[of[1]])

    def _entered(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Keys and values ``[num_kv_heads, n, head_size]`` as they are stored, side by side."""
        return torch.cat([self._turned(key - self._offset), self._turned(value)], -1)

    def _replace(
        self, pages: torch.Tensor, batch: Batch, seq: int, index: torch.Tensor, new: torch.Tensor
    ) -> None:
        stored, size = int(batch.stored[seq]), self.plan.page_tokens
        none = new.new_empty(0, new.shape[0], self.layout.head_size)
        both = torch.cat(self._held(pages, batch, seq, none, none), -1)
        written = torch.zeros(both.shape[0], self.plan.store_pages(stored), dtype=torch.bool)
        for head, row in enumerate(index.long()):
            real = row >= 0
            both[head, row[real]] = new[head, real]
            written[head, row[real & (row < stored)] // size] = True
        key, value = (x[:, :stored] for x in both.split(self.layout.head_size, -1))
        self._write_store(pages, batch, seq, 0, key, value, written)
        self._write_ring(pages, batch, seq, both[:, stored:])

    @property
    def _group(self) -> int:
        return self.shape.num_heads // self.shape.num_kv_heads

    def _held(
        self, pages: torch.Tensor, batch: Batch, seq: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All tokens of a request and the given ones, as they are stored.

        Each ``[num_kv_heads, tokens, head_size]``.
        """
        stored = self._stored(pages, batch, seq)
        pending = self._pending(pages, batch, seq, key, value)
        return torch.cat([stored[0], pending[0]], 1), torch.cat([stored[1], pending[1]], 1)

    def _stored(
        self, pages: torch.Tensor, batch: Batch, seq: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        first, parts = int(batch.store_row[seq]), []
        for row, left in enumerate(range(int(batch.stored[seq]), 0, -self.plan.page_tokens), first):
            views = self.layout.views(pages[_place(batch, seq, row, pages.shape[1])])
            parts.append(self.layout.codec.read(views, min(left, self.plan.page_tokens)))
        if not parts:
            empty = torch.zeros(
                self.shape.num_kv_heads, 0, self.layout.head_size, dtype=torch.float32
            )
            return empty, empty
        return torch.cat([k for k, _ in parts], 1), torch.cat([v for _, v in parts], 1)

    def _pending(
        self, pages: torch.Tensor, batch: Batch, seq: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ring tokens followed by the given ones, ``[num_kv_heads, tokens, head_size]``."""
        head_size, count = self.layout.head_size, int(batch.ring[seq])
        rows = range(self.plan.ring_pages if count else 0)
        places = [_place(batch, seq, row, pages.shape[1]) for row in rows]
        recent = [self.layout.ring_view(pages[place]).float() for place in places]
        fresh = self._entered(key.transpose(0, 1).float(), value.transpose(0, 1).float())
        both = torch.cat([torch.cat(recent, 1)[:, :count], fresh], 1) if count else fresh
        return both[..., :head_size], both[..., head_size:]

    def _write_store(
        self,
        pages: torch.Tensor,
        batch: Batch,
        seq: int,
        first: int,
        key: torch.Tensor,
        value: torch.Tensor,
        written: torch.Tensor | None = None,
    ) -> None:
        """Encode tokens from ``first`` on; ``written`` ``[num_kv_heads, pages]``: only there."""
        done, size = 0, self.plan.page_tokens
        while done < key.shape[1]:
            page, slot = divmod(first + done, size)
            span = slice(done, done + min(size - slot, key.shape[1] - done))
            place = _place(batch, seq, int(batch.store_row[seq]) + page, pages.shape[1])
            runs = pages[place]
            self.layout.codec.write(self.layout.views(runs), slot, key[:, span], value[:, span])
            heads = slice(None) if written is None else written[:, page]
            pages[place[0][heads], place[1][heads]] = runs[heads]
            done = span.stop

    def _write_ring(self, pages: torch.Tensor, batch: Batch, seq: int, rest: torch.Tensor) -> None:
        if self.layout.ring_dtype == torch.float16:
            rest = to_half(rest)
        for row, part in enumerate(rest.split(self.layout.ring_tokens, 1) if rest.numel() else ()):
            place = _place(batch, seq, row, pages.shape[1])
            runs = pages[place]
            view = self.layout.ring_view(runs)
            view[:, : part.shape[1]] = part.to(view.dtype)
            pages[place] = runs

    def _visible(self, batch: Batch, seq: int, total: int, reads: Reads | None) -> torch.Tensor:
        """Mask ``[num_kv_heads, fresh, total]``; the last tokens are causal."""
        fresh = int(batch.query_start[seq + 1] - batch.query_start[seq])
        causal = torch.ones(fresh, total, dtype=torch.bool).tril(total - fresh)
        mask = causal.repeat(self.shape.num_kv_heads, 1, 1)
        if reads is None:
            return mask
        page = torch.arange(int(batch.stored[seq])) // self.plan.page_tokens
        block = reads.block or max(1, fresh)
        for number, first in enumerate(range(0, fresh, block), int(reads.first[seq])):
            for head in range(self.shape.num_kv_heads):
                count = int(reads.count[number, head])
                if count >= 0:
                    read = torch.isin(page, reads.pages[number, head, :count])
                    mask[head, first : first + block, : len(page)] &= read
        return mask

    def _weights(self, query: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """``[n, heads, d]`` against ``[kv heads, tokens, d]`` -> ``[heads, n, tokens]``."""
        keys, mask = (x.repeat_interleave(self._group, 0) for x in (keys, mask))
        scores = query.transpose(0, 1) @ keys.transpose(1, 2) * self.shape.scale
        if cap := self.shape.soft_cap:
            scores = cap * torch.tanh(scores / cap)
        scores = scores.masked_fill(~mask, float("-inf"))
        if self.shape.sinks is None:
            return scores.softmax(-1)
        sinks = self.shape.sinks.detach().float()[:, None, None].expand(-1, scores.shape[1], 1)
        return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]

    def _count(self, weights: torch.Tensor, stored: int, seq: int, mass: Mass) -> None:
        out = mass.out[:, int(mass.place[seq]) :]
        counted = weights[:, int(mass.first_query[seq]) :].sum(1).unflatten(0, (-1, self._group))
        page = int(mass.first_token[seq]) // self.plan.page_tokens
        first = min(page * self.plan.page_tokens, stored)
        out[:, first : weights.shape[2]] += counted.sum(1)[:, first:]


def _span(batch: Batch, seq: int, skip: int = 0) -> slice:
    return slice(int(batch.query_start[seq]) + skip, int(batch.query_start[seq + 1]))


def _place(batch: Batch, seq: int, row: int, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Page and place in it of every head's bytes at a row index, each ``[num_kv_heads]``."""
    slot = row * heads + torch.arange(heads)
    if batch.slots is not None:
        slot = batch.slots[seq, :, row].long()
    return batch.block_table[seq, slot // heads].long(), slot % heads
