"""Sizes of tiles: what fits the registers and shared memory of the smallest GPU we compile for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cache_policies.kernels.triton.page import CODES, INT8

if TYPE_CHECKING:
    from cache_policies.kernels.triton.page import Page

MOST_SPLITS = 64
FEW_ROWS = 16  # rows of a block of decode: the least that a matrix instruction takes


def power(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


@dataclass(frozen=True)
class Tiles:
    """Sizes for one page.

    Attributes:
        block: tokens of the store in a tile.
        recent: ring or fresh tokens in a tile.
        span: tokens that one program encodes.
        part_width: channels that it encodes.
        parts: programs for all channels.
        ring_span: tokens of the ring that one program writes.
        warps: warps of a program that decodes or encodes.
        many_rows: rows (a query of a query head) of a block of prefill.
        many_warps: warps of its program.
        stages: of the software pipeline.

    """

    block: int
    recent: int
    span: int
    part_width: int
    parts: int
    ring_span: int
    warps: int
    many_rows: int
    many_warps: int
    stages: int

    @classmethod
    def of(cls, page: Page) -> Tiles:
        """Sizes for a page."""
        wide, size = page.width > 128, page.head_size
        number_bytes = 1 if page.kind == INT8 else page.stored.primitive_bitwidth // 8
        if page.kind == CODES:
            crowded = page.width == 64 and not page.by_channel
        else:
            crowded = page.width > 64
        part = page.width
        if page.kind == CODES and page.group < size:  # a power of two that divides the head size
            part = max(page.group, min(64, size & -size))
        return cls(
            block=128 if page.kind == CODES else (32 if wide or number_bytes == 4 else 64),
            recent=32,
            span=max(32, page.group) if page.by_channel else 32,
            part_width=part,
            parts=-(-size // part),
            ring_span=32,
            warps=8 if wide else 4,
            # Codes are decoded in registers; with 64 rows of 128 channels they spill on sm_80.
            many_rows=64 if page.width == 64 or page.kind != CODES else (16 if wide else 32),
            # Scales of a token take registers too: 64 rows on four warps spill on sm_80 with them.
            many_warps=8 if wide or crowded else 4,
            # A second stage takes registers that these have not: int8 spills on sm_80 with it.
            stages=1 if wide or page.kind == INT8 else 2,
        )
