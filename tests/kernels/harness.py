"""Random batches over random pages: what the kernel tests and the benchmarks share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from hypothesis import strategies as st

from cache_policies.kernels.contract import Batch, Shape
from cache_policies.kernels.reference import ReferenceKernel
from cache_policies.pages.codecs.packing import LANES
from cache_policies.pages.plan import Plan
from cache_policies.policy import parse
from cache_policies.policy.layouts import layouts

if TYPE_CHECKING:
    from cache_policies.kernels.counts import Buffers
    from cache_policies.pages.layout import PageLayout

# Largest allowed difference of outputs of order 1, by model dtype. float32: summation order,
# and the rounding of integer dot products (see docs/benchmarks.md); the others: half a unit
# in the last place of the output, and the same.
TOLERANCE = {torch.float32: 2e-2, torch.float16: 2e-2, torch.bfloat16: 4e-2}
# Soft caps on scores of order 1: none, one that bends all of them, one that bends few.
CAPS = st.sampled_from((0.0, 0.0, 0.5, 5.0))
# Queries in 8 bits, as 3-bit keys meet them on AVX2, weigh more where a scale spans a whole head:
# still under a tenth of the codec's own error (test_cpu.py).
WIDER = {"rotated-3bit": 4e-2}
EXACT = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # no integer dots


@dataclass
class Setup:
    """One layer with its pages."""

    layout: PageLayout
    shape: Shape
    pages: torch.Tensor
    block_table: torch.Tensor

    @classmethod
    def make(
        cls,
        policy: str,
        *,
        seqs: int = 2,
        heads: int = 6,
        kv_heads: int = 2,
        head_size: int = 64,
        page_tokens: int = 128,
        max_tokens: int = 640,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        soft_cap: float = 0.0,
        sinks: bool = False,
        packing: str = LANES,
    ) -> Setup:
        """Pages of a policy; of its edge layers, if it has some."""
        parsed = parse(policy)
        layout = layouts(parsed, head_size, page_tokens, dtype, packing)[parsed.edges is not None]
        plan = Plan.of(layout)
        row = plan.ring_pages + -(-max_tokens // page_tokens)
        rng = torch.Generator().manual_seed(seed)
        # 0xFF is a NaN in every float type: what is read before it was written shows
        pages = torch.full((seqs * row + 1, kv_heads, layout.head_bytes), 255, dtype=torch.uint8)
        order = torch.randperm(seqs * row, generator=rng) + 1
        table = order.to(torch.int32).reshape(seqs, row)
        learned = torch.randn(heads, generator=rng) * 3 if sinks else None
        shape = Shape(heads, kv_heads, head_size**-0.5, soft_cap=soft_cap, sinks=learned)
        return cls(layout, shape, pages, table)

    def batch(self, computed: list[int], fresh: list[int], buffers: Buffers | None = None) -> Batch:
        start = np.concatenate([[0], np.cumsum(fresh)]).astype(np.int32)
        before = np.array(computed, dtype=np.int32)
        return Batch.of(Plan.of(self.layout), start, before, self.block_table, buffers)

    def tokens(self, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rng = torch.Generator().manual_seed(seed)
        d, dtype = self.layout.head_size, self.layout.model_dtype
        shapes = [(count, h, d) for h in (self.shape.num_heads, *[self.shape.num_kv_heads] * 2)]
        q, k, v = (torch.randn(s, generator=rng).to(dtype) for s in shapes)
        return q, k, v

    def fill(self, computed: list[int], seed: int = 1) -> None:
        """Make ``computed`` tokens present, through the reference kernel."""
        kernel = ReferenceKernel(self.layout, self.shape)
        _, k, v = self.tokens(sum(computed), seed)
        kernel.append(self.pages, self.batch([0] * len(computed), computed), k, v)
