"""Triton kernels under the kernels' contract: checks, grids and buffers."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from cache_policies.kernels.counts import all_tokens, spans
from cache_policies.kernels.triton import plans
from cache_policies.kernels.triton.arguments import Chosen, Places, require
from cache_policies.kernels.triton.device import attend as attending
from cache_policies.kernels.triton.device import encode as encoding
from cache_policies.kernels.triton.device.mass import mass as count_mass
from cache_policies.kernels.triton.device.read import read as read_tokens
from cache_policies.kernels.triton.launch import launch
from cache_policies.kernels.triton.page import LOG2_E, Page, interpreting
from cache_policies.kernels.triton.sparse import Samples, add_shares
from cache_policies.kernels.triton.tasks import tasks_of
from cache_policies.kernels.triton.turning import Turning
from cache_policies.pages.codecs.packing import PLANES

if TYPE_CHECKING:
    from cache_policies.kernels.contract import Batch, Mass, Reads, Shape
    from cache_policies.kernels.triton.tasks import Tasks
    from cache_policies.pages.layout import PageLayout


class TritonKernel:
    """Attention on a GPU; or on CPU tensors, slowly, in Triton's interpreter.

    Args:
        layout: fields of a page, packed as planes.
        shape: heads and scale of the layer.
        splits: parts that decode divides the store of a request into; by default as many as fill
            the GPU.

    """

    name = "triton"
    packing = PLANES

    def __init__(self, layout: PageLayout, shape: Shape, *, splits: int | None = None) -> None:
        self.layout, self.shape, self.splits = layout, shape, splits
        self.page = Page.of(layout, shape)
        self.turning = Turning(self.page, shape.key_offset)
        self.tiles = plans.Tiles.of(self.page)
        self._group = shape.num_heads // shape.num_kv_heads

    @classmethod
    def summary(cls) -> str:
        if interpreting():
            return "triton (in its interpreter, very slow)"
        return f"triton ({torch.cuda.get_device_name()})"

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
        self._check(pages, batch, query=query, key=key, value=value, output=output)
        chosen, lse = Chosen(reads, batch, self._group, self.tiles.many_rows), None
        if mass is not None:
            lse = torch.empty(*query.shape[:2], dtype=torch.float32, device=pages.device)
        few, many = tasks_of(batch, self._group, self.tiles.many_rows)
        turning, room = self.turning, self.turning.room(output)
        query, key, value = turning.rotated(query), turning.keys(key), turning.rotated(value)
        tensors = query, key, value, room
        if len(many):
            self._attend(batch, many, pages, chosen, tensors, lse, 0)
        if len(few):
            self._attend(batch, few, pages, chosen, tensors, lse, self._splits(batch, few))
        turning.rotate_back(room, output)
        if mass is not None:
            assert lse is not None
            self._mass(batch, mass, pages, chosen, query, key, lse)

    def page_mass(
        self,
        pages: torch.Tensor,
        batch: Batch,
        query: torch.Tensor,
        key: torch.Tensor,
        blocks: torch.Tensor,
        samples: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._check(pages, batch, query=query, key=key)
        size, kv_heads = self.layout.page_tokens, self.shape.num_kv_heads
        width = -(-int(batch.host.stored.max(initial=0)) // size) * size
        out = torch.zeros(len(blocks), kv_heads, width, dtype=torch.float32, device=pages.device)
        if len(blocks):
            chosen = Samples(batch, blocks, samples)
            key = self.turning.keys(key)
            query = self.turning.rotated(query[chosen.lines])
            add_shares(self.page, self.tiles, self.shape, pages, batch, chosen, query, key, out)
            out /= (chosen.blocks[:, 1] * self._group)[:, None, None]
        mass = out.unflatten(2, (-1, size)).sum(3) if width else out
        return mass, 1 - mass.sum(2)

    def append(
        self, pages: torch.Tensor, batch: Batch, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        self._check(pages, batch, key=key, value=value)
        key, value = self.turning.keys(key), self.turning.rotated(value)
        counts, host, tiles, table = batch.device_counts, batch.host, self.tiles, batch.block_table
        seqs, heads, places = batch.num_seqs, self.shape.num_kv_heads, Places(batch, self.page)
        tables = pages, table, places.slots, table.stride(0), places.stride
        strides = key.stride(0), value.stride(0), pages.stride(0), pages.stride(1)
        parts = -(-host.stored_after // tiles.span) - host.stored // tiles.span
        parts = parts[host.stored_after > host.stored]
        launch(
            encoding.absorb, (int(parts.max(initial=0)), seqs, heads * tiles.parts),
            key, value, counts.query_start, counts.stored, counts.ring, counts.stored_after,
            counts.store_row, *tables, *strides,
            PAGE=places.page, SPAN=tiles.span, WIDTH=tiles.part_width, warps=tiles.encode_warps,
            fusion=False,
        )  # fmt: skip
        left = host.ring + host.appended - host.stored_after + host.stored
        most = int(left[host.appended > 0].max(initial=0)) if self.layout.residual else 0
        launch(
            encoding.keep_ring, (-(-most // tiles.ring_span), seqs, heads),
            key, value, counts.query_start, counts.ring, counts.stored, counts.stored_after,
            counts.appended, *tables, *strides, PAGE=places.page, SPAN=tiles.ring_span,
        )  # fmt: skip

    def read(
        self,
        pages: torch.Tensor,
        batch: Batch,
        key: torch.Tensor,
        value: torch.Tensor,
        index: torch.Tensor | None = None,
        start: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._check(pages, batch, key=key, value=value)
        key, value = self.turning.keys(key), self.turning.rotated(value)
        if index is None:
            numbers, start = all_tokens(batch.host)
            index = numbers.expand(self.shape.num_kv_heads, -1)
        index, host = _int32("index", index, pages), batch.host
        shape = (2, *index.shape, self.layout.head_size)
        out = torch.empty(shape, dtype=torch.float32, device=pages.device)
        block, places = self.tiles.ring_span, Places(batch, self.page)
        for seq, (first, end) in enumerate(pairwise(spans(host, index.shape[1], start))):
            fresh = int(host.query_start[seq] + host.appended[seq])
            launch(
                read_tokens, (-(-(end - first) // block), self.shape.num_kv_heads),
                index[:, first:], key, value, out[0, :, first:], out[1, :, first:],
                int(host.stored[seq]), int(host.ring[seq]), fresh, end - first, index.shape[1],
                pages, batch.block_table[seq], places.slots[seq], int(host.store_row[seq]),
                places.stride, key.stride(0), value.stride(0), pages.stride(0), pages.stride(1),
                PAGE=places.page, BLOCK=block, warps=self.tiles.warps, fusion=False,
            )  # fmt: skip
        rows = out.transpose(1, 2)
        self.turning.keys_back(rows[0], rows[0])
        self.turning.rotate_back(rows[1], rows[1])
        if self.shape.key_offset is not None:
            out[0].masked_fill_(index[..., None] < 0, 0)
        return out[0], out[1]

    def write(
        self,
        pages: torch.Tensor,
        batch: Batch,
        index: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        start: torch.Tensor | None = None,
    ) -> None:
        self._check(pages, batch)
        wanted = (self.shape.num_kv_heads, index.shape[1], self.layout.head_size)
        for x in (key, value):
            require(x.dtype == torch.float32 and x.is_contiguous(), "write takes float32")
            require(x.shape == wanted, f"write: shape {tuple(x.shape)} is not {wanted}")
        index = _int32("index", index, pages)
        key = self.turning.keys(key.transpose(0, 1)).transpose(0, 1)
        value = self.turning.rotated(value.transpose(0, 1)).transpose(0, 1)
        for seq, (first, end) in enumerate(pairwise(spans(batch.host, index.shape[1], start))):
            if end > first:
                part = slice(first, end)
                self._write(pages, batch, seq, index[:, part], key[:, part], value[:, part])

    def _write(
        self, pages: torch.Tensor, batch: Batch, seq: int, index: torch.Tensor,
        key: torch.Tensor, value: torch.Tensor,
    ) -> None:  # fmt: skip
        """Tokens of one request."""
        host, tiles, stride = batch.host, self.tiles, key.stride(0) // self.layout.head_size
        stored, ring, row = int(host.stored[seq]), int(host.ring[seq]), int(host.store_row[seq])
        places = Places(batch, self.page)
        if self.page.by_channel:
            require(index.shape[1] == stored + ring, "write all tokens, in order")
        inverse = _inverse(index, stored + ring)
        for in_ring, slots, span in ((False, stored, tiles.span), (True, ring, tiles.ring_span)):
            width, parts = (self.page.width, 1) if in_ring else (tiles.part_width, tiles.parts)
            launch(
                encoding.write, (-(-slots // span), self.shape.num_kv_heads * parts),
                inverse, key, value, stored, stored + ring, stride, pages,
                batch.block_table[seq], places.slots[seq], row, places.stride,
                pages.stride(0), pages.stride(1), PAGE=places.page, SPAN=span, WIDTH=width,
                RING=in_ring, warps=tiles.encode_warps, fusion=False,
            )  # fmt: skip

    # ---- attention

    def _attend(
        self, batch: Batch, tasks: Tasks, pages: torch.Tensor, chosen: Chosen, tensors: Any,
        lse: torch.Tensor | None, splits: int,
    ) -> None:  # fmt: skip
        """All blocks of ``tasks``; with their stores split if ``splits`` is not 0."""
        (query, key, value, output), table = tensors, batch.block_table
        counts, tiles, places = batch.device_counts, self.tiles, Places(batch, self.page)
        heads, lines = self.shape.num_heads, tasks.lines.shape[0] if splits else 0
        shape = (lines, heads, splits + 1)
        sums = torch.empty(*shape, self.layout.head_size, dtype=torch.float32, device=pages.device)
        part_lse = torch.empty(shape, dtype=torch.float32, device=pages.device)
        total = part_lse if lse is None else lse
        sinks = part_lse if self.shape.sinks is None else self.shape.sinks.detach()
        launch(
            attending.attend, (len(tasks), self.shape.num_kv_heads, splits + 1),
            query, key, value, output, sums, part_lse, total, sinks.to(pages.device),
            tasks.blocks, counts.query_start,
            counts.stored, counts.ring, counts.store_row, pages, table, places.slots, chosen.pages,
            chosen.count, chosen.lists, self.shape.scale * LOG2_E, splits, chosen.width,
            chosen.block, table.stride(0),
            places.stride, query.stride(0), key.stride(0), value.stride(0), output.stride(0),
            pages.stride(0), pages.stride(1),
            PAGE=places.page, M=plans.FEW_ROWS if splits else tiles.many_rows,
            BLOCK=tiles.block if splits else tiles.many_block,
            RECENT=tiles.recent, SPLIT=splits > 0, READS=chosen.any, LSE=lse is not None,
            warps=tiles.warps if splits else tiles.many_warps, stages=tiles.stages,
        )  # fmt: skip
        if splits:
            launch(
                attending.combine, (lines, heads), sums, part_lse, output, total, tasks.lines,
                splits + 1, output.stride(0), PAGE=self.page, WIDTH=plans.JOINED,
                LSE=lse is not None,
            )  # fmt: skip

    def _mass(
        self, batch: Batch, mass: Mass, pages: torch.Tensor, chosen: Chosen,
        query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor,
    ) -> None:  # fmt: skip
        """Count the mass of every token, a program for each tile of tokens."""
        out, tiles, host, table = mass.out, self.tiles, batch.host, batch.block_table
        require(out.dtype == torch.float32 and out.stride(1) == 1, "mass: float32")
        require(out.shape[0] == self.shape.num_kv_heads, "mass: heads")
        require(out.device == pages.device, "mass and pages on one device")
        fresh, counts = host.query_start[1:] - host.query_start[:-1], batch.device_counts
        places = Places(batch, self.page)
        flags = chosen.flags(-(-int(host.stored.max(initial=0)) // self.layout.page_tokens))
        ends = mass.place.numpy() + host.stored + host.ring + fresh
        counted = mass.place.numpy() >= 0
        require(int(ends[counted].max(initial=0)) <= out.shape[1], "mass: too few places")
        count = -(-host.stored // tiles.block) - (-host.ring // tiles.recent)
        count = (count - (-fresh // tiles.recent))[counted]
        launch(
            count_mass, (int(count.max(initial=0)), batch.num_seqs, self.shape.num_kv_heads),
            query, key, lse, counts.query_start, counts.stored, counts.ring, counts.store_row,
            *mass.device_counts, out, pages, table, places.slots, chosen.pages, chosen.count,
            chosen.lists, flags, self.shape.scale * LOG2_E, out.stride(0), chosen.width,
            chosen.block, flags.shape[-1], table.stride(0),
            places.stride, query.stride(0), key.stride(0), pages.stride(0), pages.stride(1),
            PAGE=places.page, M=plans.FEW_ROWS, BLOCK=tiles.block, RECENT=tiles.recent,
            READS=chosen.any and not chosen.block, FLAGS=chosen.block > 0, warps=tiles.warps,
            stages=tiles.stages,
        )  # fmt: skip

    def _splits(self, batch: Batch, few: Tasks) -> int:
        """Parts of a store, so that all programs together fill the GPU."""
        tiles = -(-int(batch.host.stored.max()) // self.tiles.block)
        programs = len(few) * self.shape.num_kv_heads
        wanted = self.splits or -(-_programs(batch.block_table.device) // programs)
        return max(1, min(wanted, tiles, plans.MOST_SPLITS))

    # ---- checks

    def _check(self, pages: torch.Tensor, batch: Batch, **tensors: torch.Tensor) -> None:
        table = batch.block_table
        require(table.dtype == torch.int32 and table.stride(-1) == 1, "block_table must be int32")
        require(table.device == pages.device, "block_table and pages on one device")
        if batch.slots is not None:
            require(batch.slots.device == pages.device, "slots and pages on one device")
            require(batch.slots.dtype == torch.int32, "slots: int32")
            wanted = (batch.num_seqs, self.shape.num_kv_heads)
            require(batch.slots.shape[:2] == wanted, f"slots: {tuple(batch.slots.shape)}")
            require(batch.slots.is_contiguous(), "slots must be contiguous")
        require(pages.dtype == torch.uint8 and pages.stride(-1) == 1, "pages must be bytes")
        require(pages.shape[1:] == (self.shape.num_kv_heads, self.layout.head_bytes), "page shape")
        for name, x in tensors.items():
            heads = self.shape.num_heads if name in {"query", "output"} else self.page.kv_heads
            dtype, size = self.layout.model_dtype, self.layout.head_size
            require(x.dtype == dtype, f"{name} must be {dtype}, not {x.dtype}")
            require(x.shape[1:] == (heads, size), f"{name} has shape {tuple(x.shape)}")
            # the stride of an axis of one means nothing
            in_line = x.stride(2) == 1 and (x.stride(1) == size or heads == 1)
            require(in_line, f"{name}: heads not contiguous")
            require(x.device == pages.device, f"{name} and pages on one device")


def _inverse(index: torch.Tensor, held: int) -> torch.Tensor:
    """``[kv heads, held + 1]`` int32: which row comes to a slot, -1 for none; the last is a bin."""
    heads, count = index.shape
    inverse = torch.full((heads, held + 1), -1, dtype=torch.int32, device=index.device)
    rows = torch.arange(count, dtype=torch.int32, device=index.device).expand(heads, -1)
    inverse.scatter_(1, torch.where(index < 0, held, index).long(), rows)
    return inverse[:, :held].contiguous()


def _int32(name: str, x: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    require(x.dtype == torch.int32, f"{name}: int32")
    require(x.shape[0] == pages.shape[1], f"{name}: {tuple(x.shape)}")
    return x.to(pages.device, non_blocking=True).contiguous()


@cache
def _programs(device: torch.device) -> int:
    """Programs that keep a device busy."""
    if device.type != "cuda":
        return 4
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count
