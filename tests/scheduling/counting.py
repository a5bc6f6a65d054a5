"""vLLM's scheduler with our block manager, and a worker that only counts."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from vllm import SamplingParams
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    ModelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import (
    get_request_block_hasher,
    init_none_hash,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
)
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from cache_policies.step.request import RequestState
from cache_policies.vllm_plugin.spec import RingStoreSpec
from cache_policies.vllm_plugin.versions import why_refused

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vllm.v1.kv_cache_interface import KVCacheSpec

    from cache_policies.vllm_plugin.manager import RingStoreManager

PAGE, LAYERS, LONGEST = 128, 2, 1024


class Engine:
    """Scheduler and counting workers; steps in flight where scheduling is asynchronous.

    Args:
        folder: of the model's configuration.
        policy: of the engine.
        pages: of the pool, one of which is nobody's.
        asynchronous: scheduling.
        beside: specs of layers of other kinds, a group each.
        chunk: most tokens of a step.
        caching: whether there is a prefix cache.

    """

    def __init__(
        self,
        folder: Path,
        policy: str,
        pages: int,
        *,
        asynchronous: bool,
        beside: Sequence[KVCacheSpec] = (),
        chunk: int = 256,
        caching: bool = True,
    ) -> None:
        model = ModelConfig(str(folder), tokenizer_mode="auto", skip_tokenizer_init=True,
                            dtype="float32", max_model_len=LONGEST)  # fmt: skip
        self.config = VllmConfig(
            model_config=model,
            additional_config={"cache_policy": policy},
            device_config=DeviceConfig("cpu"),
            cache_config=CacheConfig(block_size=PAGE, enable_prefix_caching=caching),
            scheduler_config=SchedulerConfig(
                max_num_batched_tokens=chunk, max_num_seqs=8, max_model_len=LONGEST,
                is_encoder_decoder=False, enable_chunked_prefill=True,
            ),
        )  # fmt: skip
        self.config.scheduler_config.async_scheduling = asynchronous
        stock = FullAttentionSpec(
            block_size=PAGE, num_kv_heads=2, head_size=64, dtype=torch.float32
        )
        self.spec = RingStoreSpec.of(stock, policy, tuple(range(LAYERS)), edge=False)
        names = [f"model.layers.{i}.attn" for i in range(LAYERS)]
        self.config.cache_config.num_gpu_blocks = pages
        page = self.spec.page_size_bytes
        tensor = KVCacheTensor(LAYERS * pages * page, names, pages * page, page)
        others = [KVCacheGroupSpec([f"other.{i}"], spec) for i, spec in enumerate(beside)]
        kv = KVCacheConfig(pages, [tensor], [KVCacheGroupSpec(names, self.spec), *others])
        modes = [getattr(spec, "mamba_cache_mode", "none") for spec in beside]
        self.config.cache_config.mamba_cache_mode = max(modes, default="none", key="align".__eq__)
        block, hashed = resolve_kv_cache_block_sizes(kv, self.config)
        self.spec.max_memory_usage_bytes(self.config)
        self.scheduler: Any = self.config.scheduler_config.get_scheduler_cls()(
            vllm_config=self.config,
            kv_cache_config=kv,
            structured_output_manager=StructuredOutputManager(self.config),
            block_size=block,
            hash_block_size=hashed,
            log_stats=True,
        )
        hashing = get_hash_fn_by_name("sha256")
        init_none_hash(hashing)
        self.hasher = get_request_block_hasher(hashed, hashing)
        self.manager: RingStoreManager = self.scheduler.policy_managers[0]
        self.in_flight: deque[tuple[Any, Any]] = deque()
        self.depth = 2 if asynchronous else 1
        self.states: dict[str, RequestState] = {}
        self.errors: set[str] = set()
        self.reasons: dict[str, str] = {}  # of errors, as they go to the server's process

    @property
    def pool(self) -> Any:
        return self.manager.block_pool

    def add(self, name: str, prompt: list[int], max_tokens: int, method: str) -> None:
        parameters = SamplingParams(
            max_tokens=max_tokens, temperature=0, ignore_eos=True,
            extra_args={"cache_policy": method} if method != "nonsense" else None,
        )  # fmt: skip
        self.scheduler.add_request(
            Request(name, prompt, parameters, None, block_hasher=self.hasher)
        )

    def step(self) -> None:
        """Schedule a step; the outcome of the oldest one comes back."""
        if self.scheduler.has_requests():
            scheduled = self.scheduler.schedule()
            self.in_flight.append((scheduled, self._compute(scheduled)))
        if self.in_flight and (
            len(self.in_flight) >= self.depth or not self.scheduler.has_requests()
        ):
            batches = self.scheduler.update_from_output(*self.in_flight.popleft())
            for output in (o for batch in batches.values() for o in batch.outputs):
                if str(output.finish_reason) == "error":
                    self.errors.add(output.request_id)
                    error = getattr(output, "error", None)  # from vLLM 0.33 on
                    reason = error.message if error else why_refused(output)
                    self.reasons[output.request_id] = str(reason)

    def _compute(self, scheduled: Any) -> ModelRunnerOutput:
        """What a worker does with a step: it follows the plan and fails where it is broken."""
        names = list(scheduled.num_scheduled_tokens)
        known = {r.req_id: r.num_computed_tokens for r in scheduled.scheduled_new_reqs}
        cached = scheduled.scheduled_cached_reqs
        known.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        tokens = []
        for name in names:
            request, before = self.scheduler.requests[name], known[name]
            after = before + scheduled.num_scheduled_tokens[name]
            method, span = self.manager.method(request), self.manager.span(request)
            state = self.states.setdefault(name, RequestState(method, span))
            state.advance(before, after)
            row = self.manager.req_to_blocks[name]
            assert len(row) >= span.pages(after)
            store = span.store_row(before)
            used = [*range(self.manager.plan.ring_pages), *range(store, span.pages(after))]
            assert not any(row[i].is_null for i in used), "a page that is read was given back"
            # the token of a prompt, or of an answer computed anew, that is not complete is dropped
            tokens.append([before % 50] if after >= request.num_tokens else [])
        return ModelRunnerOutput(names, {n: i for i, n in enumerate(names)}, tokens)
