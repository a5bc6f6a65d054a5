"""Triton kernels under the kernels' contract: checks, grids and buffers."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from cache_policies.kernels.triton import plans
from cache_policies.kernels.triton.counts import Counts, counts_of
from cache_policies.kernels.triton.device import attend as attending
from cache_policies.kernels.triton.device import encode as encoding
from cache_policies.kernels.triton.device.mass import mass as count_mass
from cache_policies.kernels.triton.device.read import read as read_tokens
from cache_policies.kernels.triton.launch import launch
from cache_policies.kernels.triton.page import Page, interpreting
from cache_policies.pages.codecs.packing import PLANES

if TYPE_CHECKING:
    from cache_policies.kernels.contract import Batch, Mass, Reads, Shape
    from cache_policies.pages.layout import PageLayout

LOG2_E = 1.4426950408889634


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
        self._check(pages, query=query, key=key, value=value, output=output)
        counts = self._counts(batch, pages)
        chosen = _Chosen(reads, counts)
        lse = None
        if mass is not None:
            lse = torch.empty(*query.shape[:2], dtype=torch.float32, device=pages.device)
        place = batch.block_table, chosen
        if len(counts.many):
            self._attend(counts, counts.many, pages, place, (query, key, value, output), lse, 0)
        if len(counts.few):
            splits = self._splits(counts)
            self._attend(counts, counts.few, pages, place, (query, key, value, output), lse, splits)
        if mass is not None:
            assert lse is not None
            self._mass(counts, mass, pages, place, query, key, lse)

    def append(
        self, pages: torch.Tensor, batch: Batch, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        self._check(pages, key=key, value=value)
        counts, tiles, table = self._counts(batch, pages), self.tiles, batch.block_table
        seqs, heads = batch.num_seqs, self.shape.num_kv_heads
        host, span = counts.host, tiles.span
        spans = -(-host["stored_after"] // span) - host["stored"] // span
        spans = spans[host["stored_after"] > host["stored"]]
        strides = table.stride(0), key.stride(0), value.stride(0), pages.stride(0), pages.stride(1)
        launch(
            encoding.absorb, (int(spans.max(initial=0)), seqs, heads * tiles.parts),
            key, value, counts.query_start, counts.stored, counts.ring, counts.stored_after,
            counts.store_row, pages, table, *strides,
            PAGE=self.page, SPAN=span, WIDTH=tiles.part_width, warps=tiles.warps, fusion=False,
        )  # fmt: skip
        left = host["ring"] + host["appended"] - host["stored_after"] + host["stored"]
        left = left[(host["appended"] > 0)]
        spans_left = -(-int(left.max(initial=0)) // tiles.ring_span) if self.layout.residual else 0
        launch(
            encoding.keep_ring, (spans_left, seqs, heads),
            key, value, counts.query_start, counts.ring, counts.stored, counts.stored_after,
            counts.appended, pages, table, *strides, PAGE=self.page, SPAN=tiles.ring_span,
        )  # fmt: skip

    def read(
        self,
        pages: torch.Tensor,
        batch: Batch,
        key: torch.Tensor,
        value: torch.Tensor,
        index: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._check(pages, key=key, value=value)
        start, stop, stored, ring, row = _one(batch)
        count = stored + ring + stop - start if index is None else index.shape[1]
        shape = (2, self.shape.num_kv_heads, count, self.layout.head_size)
        out = torch.empty(shape, dtype=torch.float32, device=pages.device)
        block = self.tiles.ring_span
        launch(
            read_tokens, (-(-count // block), self.shape.num_kv_heads),
            out if index is None else _int32("index", index, pages), key, value, out[0], out[1],
            stored, ring, start, count, pages, batch.block_table[0], row,
            key.stride(0), value.stride(0), pages.stride(0), pages.stride(1),
            PAGE=self.page, BLOCK=block, INDEX=index is not None, fusion=False,
        )  # fmt: skip
        return out[0], out[1]

    def write(
        self,
        pages: torch.Tensor,
        batch: Batch,
        index: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> None:
        self._check(pages)
        _, _, stored, ring, row = _one(batch)
        held, count, tiles = stored + ring, index.shape[1], self.tiles
        wanted = (self.shape.num_kv_heads, count, self.layout.head_size)
        for x in (key, value):
            _require(x.dtype == torch.float32 and x.is_contiguous(), "write takes float32")
            _require(x.shape == wanted, f"write: shape {tuple(x.shape)} is not {wanted}")
        if self.page.by_channel:
            _require(count == held, "write all tokens, in order")
        inverse = _inverse(_int32("index", index, pages), held)
        for ring_part, slots, span in ((False, stored, tiles.span), (True, ring, tiles.ring_span)):
            width = self.page.width if ring_part else tiles.part_width
            parts = 1 if ring_part else tiles.parts
            launch(
                encoding.write, (-(-slots // span), self.shape.num_kv_heads * parts),
                inverse, key, value, stored, held, count, pages, batch.block_table[0], row,
                pages.stride(0), pages.stride(1), PAGE=self.page, SPAN=span, WIDTH=width,
                RING=ring_part, warps=tiles.warps, fusion=False,
            )  # fmt: skip

    # ---- attention

    def _attend(
        self, counts: Counts, tasks: Any, pages: torch.Tensor, place: Any, tensors: Any,
        lse: torch.Tensor | None, splits: int,
    ) -> None:  # fmt: skip
        """All blocks of ``tasks``; with their stores split if ``splits`` is not 0."""
        (query, key, value, output), (table, chosen) = tensors, place
        heads, lines = self.shape.num_heads, tasks.lines.shape[0] if splits else 0
        shape = (lines, heads, splits + 1)
        sums = torch.empty(*shape, self.layout.head_size, dtype=torch.float32, device=pages.device)
        part_lse = torch.empty(shape, dtype=torch.float32, device=pages.device)
        total = part_lse if lse is None else lse
        launch(
            attending.attend, (len(tasks), self.shape.num_kv_heads, splits + 1),
            query, key, value, output, sums, part_lse, total, tasks.blocks, counts.query_start,
            counts.stored, counts.ring, counts.store_row, pages, table, chosen.pages,
            chosen.count, self.shape.scale * LOG2_E, splits, chosen.width, table.stride(0),
            query.stride(0), key.stride(0), value.stride(0), output.stride(0),
            pages.stride(0), pages.stride(1),
            PAGE=self.page, M=plans.FEW_ROWS if splits else self.tiles.many_rows,
            BLOCK=self.tiles.block, RECENT=self.tiles.recent, SPLIT=splits > 0,
            READS=chosen.any, LSE=lse is not None,
            warps=self.tiles.warps if splits else self.tiles.many_warps, stages=self.tiles.stages,
        )  # fmt: skip
        if splits:
            launch(
                attending.combine, (lines, heads), sums, part_lse, output, total, tasks.lines,
                splits + 1, output.stride(0), PAGE=self.page, WIDTH=plans.power(splits + 1),
                LSE=lse is not None,
            )  # fmt: skip

    def _mass(
        self, counts: Counts, mass: Mass, pages: torch.Tensor, place: Any, query: torch.Tensor,
        key: torch.Tensor, lse: torch.Tensor,
    ) -> None:  # fmt: skip
        """Count in the given tensors; addresses are differences to that of the first of them."""
        outs = [out for out in mass.out if out is not None]
        if not outs:
            return
        (table, chosen), tiles, host = place, self.tiles, counts.host
        first, base = outs[0], outs[0].data_ptr()
        offsets, strides = [
            torch.tensor(x).to(pages.device, non_blocking=True)
            for x in (
                [-1 if out is None else (out.data_ptr() - base) // 4 for out in mass.out],
                [0 if out is None else out.stride(0) for out in mass.out],
            )
        ]
        count = sum(
            -(-host_count // size)
            for host_count, size in (
                (host["stored"], tiles.block),
                (host["ring"], tiles.recent),
                (counts.fresh, tiles.recent),
            )
        )
        since = (
            x.to(pages.device, non_blocking=True) for x in (mass.first_query, mass.first_token)
        )
        launch(
            count_mass, (int(count.max()), len(mass.out), self.shape.num_kv_heads),
            query, key, lse, counts.query_start, counts.stored, counts.ring, counts.store_row,
            *since, offsets, strides, first, pages, table, chosen.pages, chosen.count,
            self.shape.scale * LOG2_E, chosen.width, table.stride(0), query.stride(0),
            key.stride(0), pages.stride(0), pages.stride(1),
            PAGE=self.page, M=plans.FEW_ROWS, BLOCK=tiles.block, RECENT=tiles.recent,
            READS=chosen.any, warps=tiles.warps, stages=tiles.stages,
        )  # fmt: skip

    def _splits(self, counts: Counts) -> int:
        """Parts of a store, so that all programs together fill the GPU."""
        tiles = -(-int(counts.host["stored"].max()) // self.tiles.block)
        programs = len(counts.few) * self.shape.num_kv_heads
        wanted = self.splits or -(-_programs(counts.stored.device) // programs)
        return max(1, min(wanted, tiles, plans.MOST_SPLITS))

    # ---- checks

    def _counts(self, batch: Batch, pages: torch.Tensor) -> Counts:
        table = batch.block_table
        _require(table.dtype == torch.int32 and table.stride(-1) == 1, "block_table must be int32")
        _require(table.device == pages.device, "block_table and pages on one device")
        return counts_of(batch, pages.device, self._group, self.tiles.many_rows)

    def _check(self, pages: torch.Tensor, **tensors: torch.Tensor) -> None:
        _require(pages.dtype == torch.uint8 and pages.stride(-1) == 1, "pages must be bytes")
        _require(pages.shape[1:] == (self.shape.num_kv_heads, self.layout.head_bytes), "page shape")
        for name, x in tensors.items():
            heads = self.shape.num_heads if name in {"query", "output"} else self.page.kv_heads
            dtype, size = self.layout.model_dtype, self.layout.head_size
            _require(x.dtype == dtype, f"{name} must be {dtype}, not {x.dtype}")
            _require(x.shape[1:] == (heads, size), f"{name} has shape {tuple(x.shape)}")
            _require(x.stride(2) == 1 and x.stride(1) == size, f"{name}: heads not contiguous")
            _require(x.device == pages.device, f"{name} and pages on one device")


class _Chosen:
    """``Reads`` on the device; where there are none, the counts stand in for both tensors."""

    def __init__(self, reads: Reads | None, counts: Counts) -> None:
        self.any, self.width = reads is not None, 0
        self.pages = self.count = counts.stored
        if reads is not None:
            device = counts.stored.device
            self.width = reads.pages.shape[2]
            self.pages = reads.pages.to(device, non_blocking=True).contiguous()
            self.count = reads.count.to(device, non_blocking=True).contiguous()
            _require(self.pages.dtype == self.count.dtype == torch.int32, "reads: int32")


def _one(batch: Batch) -> tuple[int, int, int, int, int]:
    """Fresh tokens, counts and first store page of a batch of one request, on the host."""
    _require(batch.num_seqs == 1, "a batch of one request is read and written")
    start, stop = batch.query_start.tolist()
    return start, stop, int(batch.stored[0]), int(batch.ring[0]), int(batch.store_row[0])


def _inverse(index: torch.Tensor, held: int) -> torch.Tensor:
    """``[kv heads, held + 1]`` int32: which row comes to a slot, -1 for none; the last is a bin."""
    heads, count = index.shape
    inverse = torch.full((heads, held + 1), -1, dtype=torch.int32, device=index.device)
    rows = torch.arange(count, dtype=torch.int32, device=index.device).expand(heads, -1)
    inverse.scatter_(1, torch.where(index < 0, held, index).long(), rows)
    return inverse[:, :held].contiguous()


def _int32(name: str, x: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    _require(x.dtype == torch.int32, f"{name}: int32")
    _require(x.shape[0] == pages.shape[1], f"{name}: {tuple(x.shape)}")
    return x.to(pages.device, non_blocking=True).contiguous()


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"triton kernel: {message}")


@cache
def _programs(device: torch.device) -> int:
    """Programs that keep a device busy."""
    if device.type != "cuda":
        return 4
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count
