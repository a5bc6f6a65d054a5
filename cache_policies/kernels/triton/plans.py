"""Sizes of tiles: what fits the registers and shared memory of the smallest GPU we compile for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import triton.language as tl

from cache_policies.kernels.triton.page import CODES, INT8

if TYPE_CHECKING:
    from cache_policies.kernels.triton.page import Page

MOST_SPLITS = 64
JOINED = 16  # parts of a split store that are joined at a time
FEW_ROWS = 16  # rows of a block of decode: the least that a matrix instruction takes


@dataclass(frozen=True)
class Tiles:
    """Sizes for one page.

    Attributes:
        block: tokens of the store in a tile.
        many_block: the same in prefill.
        recent: ring or fresh tokens in a tile.
        span: tokens that one program encodes.
        part_width: channels that it encodes.
        parts: programs for all channels.
        ring_span: tokens of the ring that one program writes.
        warps: warps of a program of decode, of mass, or of one that reads.
        encode_warps: of one that encodes.
        many_rows: rows (a query of a query head) of a block of prefill.
        many_warps: warps of its program.
        stages: of the software pipeline.

    """

    block: int
    many_block: int
    recent: int
    span: int
    part_width: int
    parts: int
    ring_span: int
    warps: int
    encode_warps: int
    many_rows: int
    many_warps: int
    stages: int

    @classmethod
    def of(cls, page: Page) -> Tiles:
        """Sizes for a page."""
        wide, size = page.width > 128, page.head_size
        number_bytes = 1 if page.kind == INT8 else page.stored.primitive_bitwidth // 8
        coded = page.kind == CODES
        if coded:
            crowded = page.width == 128 and min(page.key_bits, page.value_bits) == 2
        else:
            crowded = page.width > 64
        # Scales of a token, and 16-bit numbers of 256 channels, take registers: with 32, flexgen's
        # decode spills on sm_90, and attention over fp16 on sm_80.
        few = page.width == 64 and not page.by_channel if coded else wide and number_bytes == 2
        many_block = 32 if wide or number_bytes == 4 else 64
        block = 64 if number_bytes == 2 else many_block  # 32 of 256 channels spill on sm_80
        # Float32 is multiplied as three products in TF32: with more rows these spill, and raw pages
        # take more shared memory than sm_86 has.
        exact = page.recent == tl.float32
        part = page.width
        if coded and page.group < size:  # a power of two that divides the head size
            part = max(page.group, min(64, size & -size))
        return cls(
            block=128 if coded else block,
            many_block=128 if coded else many_block,
            recent=16 if few or exact else 32,
            span=max(32, page.group) if page.by_channel else 32,
            part_width=part,
            parts=-(-size // part),
            ring_span=32,
            warps=8 if wide else 4,
            # A lone group of channels is encoded by one program; four warps spill on sm_80 with it.
            encode_warps=8 if wide or (coded and part > 64) else 4,
            # Codes are decoded in registers: they spill on sm_80 with 64 rows on four warps, take
            # more instructions for a row on eight, and those of 2 bits spill on sm_90 with 32 rows.
            many_rows=16 if exact else (16 if wide else 32) if coded else 64,
            many_warps=8 if wide or (page.width > 64 if exact else crowded) else 4,
            # A second stage takes registers that numbers of 256 channels and int8 have not: those
            # spill on sm_80 with it. It leaves codes more, on sm_100 and gfx942 by far.
            stages=2 if coded or not (wide or page.kind == INT8) else 1,
        )
