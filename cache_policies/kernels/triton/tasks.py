"""What the programs of ``attend`` take on: blocks of query rows, listed once for a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from cache_policies.kernels.counts import beside
from cache_policies.kernels.triton.plans import FEW_ROWS

if TYPE_CHECKING:
    import numpy.typing as npt

    from cache_policies.kernels.contract import Batch


@dataclass(frozen=True)
class Tasks:
    """Blocks of query rows; a row is one query of one query head of a KV head.

    Attributes:
        blocks: ``[n, 3]`` int32 on the device: request, first row, number of its first query
            among ``lines``.
        lines: ``[queries]`` int32 on the device: the queries' numbers in the step.

    """

    blocks: torch.Tensor
    lines: torch.Tensor

    def __len__(self) -> int:
        """Number of blocks."""
        return self.blocks.shape[0]


def tasks_of(batch: Batch, group: int, many_rows: int) -> tuple[Tasks, Tasks]:
    """Tasks of requests with one fresh token, in blocks of ``FEW_ROWS``, and of the others.

    Made and copied once for all layers of a step.

    Args:
        batch: the step.
        group: query heads of a KV head.
        many_rows: rows of a block of the others.

    """
    known: dict[tuple[int, int], tuple[Tasks, Tasks]]
    known = batch.__dict__.setdefault("triton_tasks", {})
    if (group, many_rows) not in known:
        known[group, many_rows] = _make(batch, group, many_rows)
    return known[group, many_rows]


def _make(batch: Batch, group: int, many_rows: int) -> tuple[Tasks, Tasks]:
    start = batch.host.query_start
    fresh = np.diff(start)
    arrays: list[npt.NDArray[np.int32]] = []
    for chosen, rows in ((fresh == 1, FEW_ROWS), (fresh != 1, many_rows)):
        arrays += _tasks(start, np.where(chosen, fresh, 0), group, rows)
    columns = [torch.from_numpy(array) for array in arrays]
    few, few_lines, many, many_lines = beside(columns, batch.block_table.device)
    return Tasks(few.view(-1, 3), few_lines), Tasks(many.view(-1, 3), many_lines)


def _tasks(
    start: npt.NDArray[np.int32], fresh: npt.NDArray[np.int32], group: int, rows: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """``Tasks.blocks`` (flat) and ``Tasks.lines``."""
    blocks = -(-fresh * group // rows)
    seq = np.repeat(np.arange(len(fresh)), blocks)
    first = np.arange(len(seq)) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    line = np.cumsum(fresh) - fresh
    table = np.stack([seq, first * rows, line[seq]], 1)
    lines = np.repeat(start[:-1] - line, fresh) + np.arange(int(fresh.sum()))
    return table.astype(np.int32).ravel(), lines.astype(np.int32)
