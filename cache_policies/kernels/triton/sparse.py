"""What a sparse prefill asks of the Triton kernels: shares of attention that store pages get."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cache_policies.kernels.contract import sampled
from cache_policies.kernels.counts import beside

if TYPE_CHECKING:
    from cache_policies.kernels.contract import Batch


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
