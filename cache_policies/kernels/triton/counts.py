"""A batch's counts where the kernels read them: the one place that copies them to the device."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch

from cache_policies.kernels.triton.plans import FEW_ROWS

if TYPE_CHECKING:
    import numpy.typing as npt

    from cache_policies.kernels.contract import Batch

NAMES = ("query_start", "stored", "ring", "stored_after", "appended", "store_row")


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


@dataclass(frozen=True)
class Counts:
    """A step on the host and on the device.

    Attributes:
        host: counts by name, ``[num_seqs]`` int32 (``query_start`` one more).
        query_start: the same on the device; so are the others.
        few: rows of requests with one query, a block each ``FEW_ROWS``, whose store is split.
        many: those of the other requests, a block each ``many_rows``.

    """

    host: dict[str, npt.NDArray[np.int32]]
    query_start: torch.Tensor
    stored: torch.Tensor
    ring: torch.Tensor
    stored_after: torch.Tensor
    appended: torch.Tensor
    store_row: torch.Tensor
    few: Tasks
    many: Tasks

    @property
    def fresh(self) -> npt.NDArray[np.int32]:
        """Fresh tokens of each request."""
        return np.diff(self.host["query_start"])


_known: dict[tuple[int, torch.device, int, int], tuple[weakref.ref[Batch], Counts]] = {}


def counts_of(batch: Batch, device: torch.device, group: int, many_rows: int) -> Counts:
    """The counts of a batch; made once for all layers of a step.

    Args:
        batch: the step.
        device: where the pages are.
        group: query heads of a KV head.
        many_rows: rows of a block of prefill.

    """
    key = (id(batch), device, group, many_rows)
    known = _known.get(key)
    if known is not None and known[0]() is batch:
        return known[1]
    if len(_known) > 16:
        _known.clear()
    counts = _make(batch, device, group, many_rows)
    _known[key] = (weakref.ref(batch), counts)
    return counts


def _make(batch: Batch, device: torch.device, group: int, many_rows: int) -> Counts:
    host = {name: getattr(batch, name).cpu().numpy() for name in NAMES}
    fresh = np.diff(host["query_start"])
    few = fresh == 1
    arrays = [host[name] for name in NAMES]
    for chosen, rows in ((few, FEW_ROWS), (~few, many_rows)):
        arrays += _tasks(host["query_start"], np.where(chosen, fresh, 0), group, rows)
    *counts, few_blocks, few_lines, many_blocks, many_lines = _copy(arrays, device)
    tasks = Tasks(few_blocks.view(-1, 3), few_lines), Tasks(many_blocks.view(-1, 3), many_lines)
    return Counts(host, *counts, *tasks)


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


def _copy(arrays: list[npt.NDArray[np.int32]], device: torch.device) -> list[torch.Tensor]:
    """All arrays by one copy, each from a multiple of 16 bytes on."""
    padded = [-(-a.size // 4) * 4 for a in arrays]
    flat = torch.zeros(sum(padded), dtype=torch.int32, pin_memory=device.type == "cuda")
    at = np.cumsum([0, *padded])
    for begin, array in zip(at, arrays, strict=False):
        flat.numpy()[begin : begin + array.size] = array
    there = flat.to(device, non_blocking=True)
    return [there[b : b + a.size] for b, a in zip(at, arrays, strict=False)]


assert tuple(f.name for f in fields(Counts))[1:7] == NAMES
