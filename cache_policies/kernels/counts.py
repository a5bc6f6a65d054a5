"""Counts of a batch: on the host, where a step is planned, and their copies beside the pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


class Counts(NamedTuple):
    """The counts of a batch, as tensors on a device or as arrays on the host; see ``Batch``."""

    query_start: Any
    stored: Any
    ring: Any
    stored_after: Any
    appended: Any
    store_row: Any

    def row(self, seq: int) -> Counts:
        """Those of one request."""
        start, *others = self
        return Counts(start[seq : seq + 2], *(column[seq : seq + 1] for column in others))


def beside(
    columns: Sequence[torch.Tensor], device: torch.device, buffer: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """Host counts on a device, by one copy that nobody waits for; themselves on a CPU.

    Args:
        columns: int32, on the host.
        device: where the pages are.
        buffer: int32 memory there that is written; new memory by default.

    """
    if device.type == "cpu":
        return tuple(columns)
    sizes = [len(column) for column in columns]
    # Pinned memory that torch gives out again only when the copy is over.
    packed = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
    torch.cat(tuple(columns), out=packed)
    there = torch.empty_like(packed, device=device) if buffer is None else buffer[: len(packed)]
    there.copy_(packed, non_blocking=True)
    return there.split(sizes)


class Buffers:
    """Memory on a device for the counts of a step: the same addresses in every step.

    A CUDA graph that is replayed reads them there.

    Args:
        device: where the pages are.

    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._made: list[torch.Tensor] = []
        self._taken = 0

    def begin_step(self) -> None:
        """Give the same memory out again."""
        self._taken = 0

    def take(self, items: int) -> torch.Tensor | None:
        """The next buffer of the step, of at least so many int32; None on a CPU."""
        if self.device.type == "cpu":
            return None
        if self._taken == len(self._made):
            self._made.append(torch.empty(0, dtype=torch.int32, device=self.device))
        if len(self._made[self._taken]) < items:
            grown = torch.empty(2 * items, dtype=torch.int32, device=self.device)
            self._made[self._taken] = grown
        self._taken += 1
        return self._made[self._taken - 1]


def spans(counts: Counts, count: int, start: torch.Tensor | None) -> list[int]:
    """Where the tokens of each request begin among ``count``, from ``start`` of ``Kernel.read``.

    Raises:
        ValueError: ``start`` does not fit.

    """
    if start is None and len(counts.stored) != 1:
        raise ValueError("start is needed where several requests are read or written")
    ends = [0, count] if start is None else start.numpy().tolist()
    if len(ends) != len(counts.stored) + 1 or ends[0] or ends[-1] != count or ends != sorted(ends):
        raise ValueError(
            f"start {ends} does not divide {count} tokens of {len(counts.stored)} requests"
        )
    return ends


def all_tokens(counts: Counts) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers ``[count]`` int32 of all tokens of every request, and their ``start``."""
    fresh = counts.query_start[1:] - counts.query_start[:-1] - counts.appended
    held = torch.from_numpy(counts.stored + counts.ring + fresh)
    start = torch.zeros(len(held) + 1, dtype=torch.int32)
    torch.cumsum(held, 0, dtype=torch.int32, out=start[1:])
    numbers = torch.cat([torch.arange(n, dtype=torch.int32) for n in held.numpy().tolist()])
    return numbers, start
