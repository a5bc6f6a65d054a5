"""The requests of a step, as a recurrence sees them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Batch:
    """Which tokens belong to which request, and where its state is.

    A request that decodes is one of a single token whose state is there.

    Attributes:
        query_start: int32 ``[requests + 1]``; tokens of request ``i`` are the rows
            ``query_start[i] .. query_start[i + 1]``.
        slots: int32 ``[requests]``; where the state of a request is read and written. Below zero:
            nowhere.
        has_state: bool ``[requests]``; false starts a request from zeros, whatever its slot holds.

    """

    query_start: torch.Tensor
    slots: torch.Tensor
    has_state: torch.Tensor

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """First token of each request, and the one after its last."""
        ends: list[int] = self.query_start.tolist()
        return list(pairwise(ends))

    @cached_property
    def num_tokens(self) -> int:
        return int(self.query_start[-1])

    @cached_property
    def last_slot(self) -> int:
        return int(self.slots.max()) if len(self.slots) else -1
