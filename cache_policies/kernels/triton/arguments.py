"""What a batch may have or lack, as kernels take it: tensors always, and what they mean."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from cache_policies.kernels.contract import Batch, Reads
    from cache_policies.kernels.triton.page import Page


def require(condition: bool, message: str) -> None:
    """Refuse arguments before an address is made of them."""
    if not condition:
        raise ValueError(f"triton kernel: {message}")


class Places:
    """The batch's slot map, if it has one, and the page as kernels under it know it.

    Where there is none the block table stands in for it.
    """

    def __init__(self, batch: Batch, page: Page) -> None:
        slots = batch.slots
        self.slots = batch.block_table if slots is None else slots
        self.stride = 0 if slots is None else slots.stride(1)
        self.page = page if slots is None else replace(page, mapped=True)


class Chosen:
    """``Reads`` on the device; where there are none, the counts stand in for all tensors."""

    def __init__(self, reads: Reads | None, batch: Batch, group: int, rows: int) -> None:
        self.any, self.width, self.block = reads is not None, 0, 0
        self.lists = self.pages = self.count = batch.device_counts.stored
        if reads is not None:
            require(reads.block * group % rows == 0, f"reads: {reads.block} queries a list")
            device, self.block = batch.block_table.device, reads.block
            self.width = reads.pages.shape[2]
            lists = (reads.pages, reads.count, reads.first)
            found = [x.to(device, non_blocking=True).contiguous() for x in lists]
            self.pages, self.count, self.lists = found
            require(all(x.dtype == torch.int32 for x in found), "reads: int32")

    def flags(self, pages: int) -> torch.Tensor:
        """``[lists, kv heads, pages]`` int8: which pages the lists of blocks of queries have."""
        if not self.block:
            return self.lists[:, None]
        listed = torch.arange(self.width, device=self.pages.device) < self.count[..., None]
        found = self.count.new_zeros(*self.count.shape, pages + 1, dtype=torch.int8)
        found.scatter_(2, torch.where(listed, self.pages, pages).long(), 1)
        return found[..., :pages].masked_fill(self.count[..., None] < 0, 1).contiguous()
