"""The scheduler's side: which pages a request owns.

The row of a request is its ring pages followed by its store pages (see
``cache_policies.pages.plan``). Only the store part is indexed by position, so only it takes part
in prefix caching. Pages in front of what a request kept are given back one step after the
workers left them, with their hashes: they stay hits until they are reused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from cache_policies.step.request import Engine, published_tokens, span_of
from cache_policies.vllm_plugin.config import method_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

    from cache_policies.pages.plan import Plan, Span
    from cache_policies.policy import Method, Policy


MAX_SPANS = 4096  # remembered; they are cheap to make again


class PageSpec(Protocol):
    """What the manager asks of ``RingStoreSpec``, which names the manager."""

    num_kv_heads: int
    head_size: int
    layers: tuple[int, ...]

    @property
    def plan(self) -> Plan: ...
    @property
    def policy_in_force(self) -> Policy: ...


class RingStoreManager(FullAttentionManager):  # type: ignore[misc]
    """vLLM's block manager with ring pages in front and the plan's page counts."""

    supports_fine_grained_hash_lookup = False

    def __init__(self, kv_cache_spec: PageSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.plan, self.layers = kv_cache_spec.plan, len(kv_cache_spec.layers)
        policy = kv_cache_spec.policy_in_force
        self.policy = str(policy)
        self.default, self.codec = policy.method, policy.codec_string
        self._spec = kv_cache_spec
        # of a page in the pool, which all kinds of layers take pages of the same size from, and of
        # this worker's KV heads in the layers that share this manager's pages
        self.page_bytes = self.half_bytes_per_token = 0
        self.given_back = 0  # pages, not counted in the metrics yet
        self._lacking: dict[str, int] = {}  # pages of rows that were given back, by request
        self._engine: Engine | None = None
        self._step_tokens = 1
        self._requests: Mapping[str, Request] = {}
        self._spans: dict[tuple[Method, int], Span] = {}

    def attach(
        self,
        requests: Mapping[str, Request],
        longest: int,
        layers: int,
        page_bytes: int,
        room: int,
        step_tokens: int,
    ) -> None:
        """Let the manager see the scheduler's requests.

        Args:
            requests: by id, kept up to date by the scheduler.
            longest: most tokens of a request.
            layers: how many share this manager's pages; in a hybrid model not all.
            page_bytes: bytes of a page of the pool.
            room: pages of the pool that a request's row here may take.
            step_tokens: most tokens of the steps under way.

        """
        spec = self._spec
        self.page_bytes = page_bytes
        self.key_numbers = spec.num_kv_heads * spec.head_size * layers
        self.half_bytes_per_token = 4 * self.key_numbers
        self._step_tokens, self._requests = step_tokens, requests
        published = room if self.enable_caching else None
        self._engine = Engine(self.plan, self.layers, longest, published)

    def method(self, request: Request) -> Method:
        """What the request chose."""
        return method_of(request.sampling_params, self.default)

    def span(self, request: Request) -> Span:
        """The request's token arithmetic."""
        if self._engine is None:
            raise RuntimeError(
                "the engine's scheduler is not cache_policies.vllm_plugin.scheduler."
                "PolicyScheduler; drop --scheduler-cls"
            )
        method, prompt = self.method(request), request.num_prompt_tokens
        if (method, prompt) not in self._spans:
            if len(self._spans) >= MAX_SPANS:
                self._spans.clear()
            self._spans[method, prompt] = span_of(method, self._engine, prompt)
        return self._spans[method, prompt]

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
        span = self._span(request_id)
        # To be let in it needs what it will own at once, which is less than the row it will have.
        pages = (
            span.most_pages(num_tokens, self._step_tokens)
            if apply_admission_cap
            else span.pages(num_tokens)
        )
        owned = len(self.req_to_blocks.get(request_id, ())) + len(new_computed_blocks)
        # A hit that nobody holds sits in the free queue: taking it uses a free page too.
        taken: int = self._get_num_evictable_blocks(new_computed_blocks)
        return max(0, pages - owned) + taken

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
        missing = self._span(request_id).pages(num_tokens) - len(row)
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
        self._publish(request)

    def _publish(self, request: Request) -> None:
        """Offer full pages to the prefix cache, those of earlier steps only.

        vLLM's backends write a step's keys before any of its queries are computed, so that a
        request may hit pages of the same step. Here a page is written after the attention of its
        layer, hence the pages of a step are published in the next one.
        """
        if not self.enable_caching:
            return
        limit = published_tokens(self.method(request), self.span(request))
        computed = request.num_computed_tokens
        published = self.num_cached_block.get(request.request_id, 0)
        full = self.plan.full_pages(computed if limit is None else min(computed, limit))
        # Under asynchronous scheduling tokens are computed before they are known here, and
        # without them there is no hash.
        known = len(request.block_hashes) * self.block_pool.hash_block_size
        full = min(full, known // self.block_size)
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

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        gone = self._span(request_id).given_back(processed_computed_tokens)
        if gone:
            self._publish(self._requests[request_id])
        row = self.req_to_blocks.get(request_id)
        if not gone or not row or row[gone.stop - 1] is self._null_block:
            return
        # The last pages first: a prefix is worth more than what follows it.
        freed = [row[i] for i in reversed(gone)]
        for i in gone:
            row[i] = self._null_block
        self.block_pool.free_blocks(freed)
        self._lacking[request_id] = len(freed)
        self.given_back += len(freed)

    def owned_pages(self, request_id: str) -> int:
        """Pages of the request's row that it still owns."""
        return len(self.req_to_blocks.get(request_id, ())) - self._lacking.get(request_id, 0)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        if self.req_to_blocks.get(request_id):
            self._publish(self._requests[request_id])
        self._lacking.pop(request_id, None)
        return list(super().pop_blocks_for_free(request_id))

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        return 0  # cascade attention would read the ring as a shared prefix

    def _span(self, request_id: str) -> Span:
        return self.span(self._requests[request_id])

    def _take_ring(self, row: list[KVCacheBlock]) -> None:
        if not row and self.plan.ring_pages:
            row.extend(self.block_pool.get_new_blocks(self.plan.ring_pages))
