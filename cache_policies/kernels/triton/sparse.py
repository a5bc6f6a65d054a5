"""What a sparse prefill asks of the Triton kernels: shares of attention that store pages get."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from cache_policies.kernels.contract import sampled
from cache_policies.kernels.counts import beside
from cache_policies.kernels.triton.arguments import Places
from cache_policies.kernels.triton.device import page_mass
from cache_policies.kernels.triton.launch import launch
from cache_policies.kernels.triton.page import LOG2_E, Page
from cache_policies.kernels.triton.plans import FEW_ROWS, Tiles

if TYPE_CHECKING:
    from cache_policies.kernels.contract import Batch, Shape


class Samples:
    """The compared queries of every block.

    Attributes:
        each: rows that a block has of them; those it does not need repeat its last.
        blocks: ``[n, 2]`` int32 on the device: request, queries that are compared.
        lines: ``[n * each]`` int32 on the device, their numbers in the step.
        position: the same among the fresh tokens of their request.

    """

    def __init__(self, batch: Batch, blocks: torch.Tensor, samples: int) -> None:
        start, self.each = batch.host.query_start, samples
        found, lines, position = [], [], []
        for seq, first, queries in blocks.tolist():
            chosen = sampled(first, queries, samples)
            found += [seq, len(chosen)]
            chosen += chosen[-1:] * (samples - len(chosen))
            position += chosen
            lines += [int(start[seq]) + at for at in chosen]
        columns = [torch.tensor(x, dtype=torch.int32) for x in (found, lines, position)]
        flat, self.lines, self.position = beside(columns, batch.block_table.device)
        self.blocks = flat.view(-1, 2)

    def __len__(self) -> int:
        """Number of blocks."""
        return self.blocks.shape[0]


def add_shares(
    page: Page, tiles: Tiles, shape: Shape, pages: torch.Tensor, batch: Batch, samples: Samples,
    query: torch.Tensor, key: torch.Tensor, out: torch.Tensor,
) -> None:  # fmt: skip
    """Add to ``out`` what the sampled queries of each block give every token of the store.

    Args:
        page: the layer's page.
        tiles: sizes for it.
        shape: of the layer.
        pages: as for ``Kernel.attend``.
        batch: as for ``Kernel.attend``.
        samples: the queries that are compared.
        query: their rows, ``[blocks * each, num_heads, head_size]``.
        key: the step's fresh keys.
        out: ``[blocks, num_kv_heads, tokens]`` float32.

    """
    counts, table, places = batch.device_counts, batch.block_table, Places(batch, page)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=pages.device)
    sinks = lse if shape.sinks is None else shape.sinks.detach().to(pages.device)
    tables, scale = (pages, table, places.slots), shape.scale * LOG2_E
    strides = table.stride(0), places.stride, query.stride(0)
    rows, heads = samples.each * shape.num_heads // shape.num_kv_heads, shape.num_kv_heads
    options: dict[str, Any] = {"PAGE": places.page, "SAMPLES": samples.each, "M": FEW_ROWS,
               "BLOCK": tiles.block, "warps": tiles.warps, "stages": tiles.stages}  # fmt: skip
    launch(
        page_mass.sums, (len(samples), heads, -(-rows // FEW_ROWS)),
        query, key, samples.position, lse, sinks, samples.blocks, counts.query_start,
        counts.stored, counts.ring, counts.store_row, *tables, scale, *strides, key.stride(0),
        pages.stride(0), pages.stride(1), RECENT=tiles.recent, **options,
    )  # fmt: skip
    launch(
        page_mass.shares, (-(-out.shape[2] // tiles.block), len(samples), heads),
        query, lse, samples.blocks, counts.stored, counts.store_row, out, *tables, scale,
        *strides, out.stride(1), pages.stride(0), pages.stride(1), **options,
    )  # fmt: skip
