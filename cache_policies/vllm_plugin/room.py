"""How many pages of the pool a request takes, where layers of several kinds share it.

Counted is what a request holds at most on any way to its end, a preemption near it included: then
vLLM lets it in again only if its prompt and the answer so far fit at once, and computes them in
chunks. Whoever takes no more than the pool has is served, at the latest when it is alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, MambaSpec

from cache_policies.vllm_plugin.manager import RingStoreManager

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.config import VllmConfig


def stock_pages(manager: Any, tokens: int, steps: int) -> int:
    """Pages that a request holds at most in one group of layers that are vLLM's own.

    Args:
        manager: vLLM's block manager of the group.
        tokens: that are computed.
        steps: that may be under way at the same time.

    """
    spec, whole = manager.kv_cache_spec, -(-tokens // manager.block_size)
    if isinstance(spec, MambaSpec):
        # One state behind each step, and the one before them. Without a prefix cache a block is as
        # long as the longest request: there is one.
        return min(whole, 1 + steps + spec.num_prefill_checkpoint_blocks)
    most = manager.max_admission_blocks_per_request  # of windows, with the chunk behind them
    if most is None:
        return whole
    if isinstance(spec, ChunkedLocalAttentionSpec):  # may begin within a block
        most += spec.attention_chunk_size % manager.block_size > 0
    return min(whole, most)


@dataclass(frozen=True)
class Room:
    """The pool of an engine.

    Attributes:
        pages: that requests can own.
        ours: managers of the groups of layers under the policy, usually one.
        stock: those of the other groups.
        steps: that may be under way at the same time.
        step_tokens: most tokens of these steps together.

    """

    pages: int
    ours: Sequence[RingStoreManager]
    stock: Sequence[Any]
    steps: int
    step_tokens: int

    @classmethod
    def of(cls, managers: Sequence[Any], vllm_config: VllmConfig) -> Room:
        """The pool of a scheduler's managers, which share it."""
        return cls(
            pages=managers[0].block_pool.num_gpu_blocks - 1 if managers else 0,  # one is nobody's
            ours=[m for m in managers if isinstance(m, RingStoreManager)],
            stock=[m for m in managers if not isinstance(m, RingStoreManager)],
            steps=vllm_config.max_concurrent_batches,
            step_tokens=vllm_config.max_in_flight_tokens,
        )

    def beside(self, tokens: int) -> int:
        """Pages that a request of so many computed tokens holds in other layers at most."""
        return sum(stock_pages(manager, tokens, self.steps) for manager in self.stock)

    def row(self, longest: int) -> int:
        """Pages of each group of ours that are left to the longest request."""
        return (self.pages - self.beside(longest)) // max(1, len(self.ours))

    def needed(self, request: Any, computed: int) -> int:
        """Pages in layers of all kinds that a request takes at most.

        Args:
            request: vLLM's.
            computed: its tokens at the end.

        """
        rows = (m.span(request).most_pages(computed, self.step_tokens) for m in self.ours)
        return sum(rows) + self.beside(computed)
