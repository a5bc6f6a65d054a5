"""What every kernel takes and does; the three implementations are compared on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from cache_policies.page import PageLayout
    from cache_policies.plan import Plan


@dataclass(frozen=True)
class Batch:
    """The requests of one step, and where their tokens lie.

    Attributes:
        query_start: ``[num_seqs + 1]`` int32, first fresh token of each request.
        stored: ``[num_seqs]`` int32, tokens in the store before this step.
        ring: ``[num_seqs]`` int32, tokens in the ring before this step.
        stored_after: ``[num_seqs]`` int32, tokens in the store after this step.
        block_table: ``[num_seqs, row]`` int32, ring pages first.

    """

    query_start: torch.Tensor
    stored: torch.Tensor
    ring: torch.Tensor
    stored_after: torch.Tensor
    block_table: torch.Tensor

    @property
    def num_seqs(self) -> int:
        """Requests in the batch."""
        return self.stored.shape[0]

    @classmethod
    def of(
        cls,
        plan: Plan,
        query_start: npt.NDArray[np.int32],
        computed: npt.NDArray[np.int32],
        block_table: torch.Tensor,
    ) -> Batch:
        """Apply the plan to a step.

        Args:
            plan: the policy's token arithmetic.
            query_start: ``[num_seqs + 1]`` int32.
            computed: ``[num_seqs]`` int32, tokens computed before this step.
            block_table: ``[num_seqs, row]`` int32.

        """
        after = computed + (query_start[1:] - query_start[:-1])
        stored = plan.stored(computed)
        return cls(
            torch.from_numpy(query_start),
            torch.from_numpy(stored),
            torch.from_numpy(computed - stored),
            torch.from_numpy(plan.stored(after)),
            block_table,
        )


@dataclass(frozen=True)
class Shape:
    """Shape of one attention layer.

    Attributes:
        num_heads: query heads; a multiple of ``num_kv_heads``.
        num_kv_heads: key/value heads.
        scale: factor of the scores, usually ``head_size ** -0.5``.

    """

    num_heads: int
    num_kv_heads: int
    scale: float


class Kernel(Protocol):
    """Attention of one layer over compressed pages."""

    name: str

    def __init__(self, layout: PageLayout, shape: Shape) -> None: ...

    @classmethod
    def summary(cls) -> str:
        """Name and variant, for the log."""

    def attend(
        self,
        pages: torch.Tensor,
        batch: Batch,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Softmax over store, ring and fresh tokens, causal inside the fresh ones.

        Args:
            pages: ``[num_pages, num_kv_heads, head_bytes]`` uint8.
            batch: the step; pages hold what was computed before it.
            query: ``[num_tokens, num_heads, head_size]``.
            key: ``[num_tokens, num_kv_heads, head_size]``, the fresh keys.
            value: same shape as ``key``.
            output: same shape as ``query``, written.

        """

    def append(
        self, pages: torch.Tensor, batch: Batch, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Write the fresh tokens into the ring; absorb full groups into the store.

        Runs after ``attend`` of the same step, which reads the ring this overwrites.
        """
