"""The scheduler's side: which pages a request owns.

The row of a request is its ring pages followed by its store pages (see
``cache_policies.plan``). Only the store part is indexed by position, so only it takes part
in prefix caching.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

    from cache_policies.vllm_plugin.spec import RingStoreSpec


class RingStoreManager(FullAttentionManager):  # type: ignore[misc]
    """vLLM's block manager with ring pages in front and the plan's page counts."""

    supports_fine_grained_hash_lookup = False

    def __init__(self, kv_cache_spec: RingStoreSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.plan = kv_cache_spec.plan

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        owned = len(self.req_to_blocks.get(request_id, ())) + len(new_computed_blocks)
        # A hit that nobody holds sits in the free queue: taking it uses a free page too.
        taken: int = self._get_num_evictable_blocks(new_computed_blocks)
        return max(0, self.plan.pages(num_tokens) - owned) + taken

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        row = self.req_to_blocks[request_id]
        assert not row, "only a request without pages can adopt prefix-cache hits"
        # Hits are touched before the ring is taken, or the pool might reuse one of them.
        if self.enable_caching:
            self.block_pool.touch(new_computed_blocks)
        self._take_ring(row)
        row.extend(new_computed_blocks)
        self.num_cached_block[request_id] = len(new_computed_blocks)

    def allocate_new_blocks(
        self,
        request_id: str,
        num_tokens: int,
        num_tokens_main_model: int,
    ) -> list[KVCacheBlock]:
        row = self.req_to_blocks[request_id]
        before = len(row)
        self._take_ring(row)
        missing = self.plan.pages(num_tokens) - len(row)
        if missing > 0:
            row.extend(self.block_pool.get_new_blocks(missing))
        return list(row[before:])

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        published = self.num_cached_block.get(request.request_id, 0)
        full = self.plan.full_pages(num_tokens)
        if published >= full:
            return
        self.block_pool.cache_full_blocks(
            request=request,
            blocks=self.req_to_blocks[request.request_id][self.plan.ring_pages :],
            num_cached_blocks=published,
            num_full_blocks=full,
            block_size=self.block_size,
            kv_cache_group_id=self.kv_cache_group_id,
        )
        self.num_cached_block[request.request_id] = full

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        return 0  # cascade attention would read the ring as a shared prefix

    def _take_ring(self, row: list[KVCacheBlock]) -> None:
        if not row and self.plan.ring_pages:
            row.extend(self.block_pool.get_new_blocks(self.plan.ring_pages))
