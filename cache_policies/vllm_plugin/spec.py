"""What vLLM's memory accounting knows of our pages."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Self

import torch
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from cache_policies.pages.plan import Plan
from cache_policies.policy import Policy, parse
from cache_policies.policy.layouts import layouts
from cache_policies.step.request import Engine, span_of
from cache_policies.vllm_plugin.config import ASYNC_SCHEDULER, SCHEDULER
from cache_policies.vllm_plugin.manager import RingStoreManager

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from cache_policies.pages.layout import PageLayout


@dataclass(frozen=True, kw_only=True)
class RingStoreSpec(FullAttentionSpec):  # type: ignore[misc]
    """Ring and store pages of one attention layer; the scheduler receives it pickled.

    Attributes:
        policy: canonical policy string.
        model_dtype: dtype of keys and values; ``dtype`` itself is uint8, the pages' type.
        layers: numbers of the model's layers under the policy; budgets that differ between
            layers count these.
        edge: whether the layer has the codec of the policy's term ``layers``.

    """

    policy: str
    model_dtype: torch.dtype
    layers: tuple[int, ...]
    edge: bool = False

    @classmethod
    def of(
        cls, spec: AttentionSpec, policy: str, layers: tuple[int, ...], *, edge: bool
    ) -> RingStoreSpec:
        """Our spec of a layer for which vLLM made ``spec``."""
        given = {f.name: getattr(spec, f.name) for f in fields(spec) if f.init}
        given.update(
            dtype=torch.uint8, policy=policy, model_dtype=spec.dtype, layers=layers, edge=edge
        )
        return cls(**given)

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        if any(spec != specs[0] for spec in specs):
            raise AssertionError("layers of one KV cache group must have the same page layout")
        return specs[0]

    @property
    def policy_in_force(self) -> Policy:
        """The engine's policy."""
        return parse(self.policy)

    @property
    def layout(self) -> PageLayout:
        """Page fields; vLLM may change the block size, so they are derived from it."""
        both = layouts(self.policy_in_force, self.head_size, self.block_size, self.model_dtype)
        return both[self.edge]

    @property
    def plan(self) -> Plan:
        """Token arithmetic of the policy."""
        return Plan.of(self.layout)

    @property
    def state_content_size_bytes(self) -> int:
        """Bytes of a page per KV head and token."""
        return self.layout.head_bytes // self.block_size

    @property
    def block_table_token_alignment(self) -> int | None:
        return None

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        # vLLM asks this in the engine's process, before it makes the scheduler.
        scheduler = vllm_config.scheduler_config
        scheduler.scheduler_cls = ASYNC_SCHEDULER if scheduler.async_scheduling else SCHEDULER
        # One page more: what a request keeps may begin on a page of its own.
        pages = self.most_pages(vllm_config.model_config.max_model_len) + 1
        return int(pages * self.page_size_bytes)

    def most_pages(self, longest: int) -> int:
        """Pages of a request of so many tokens under the engine's method.

        Less than the tokens take where the method is bounded. What asks for more than the pool
        has under a method of its own is refused when it comes.
        """
        method, whole = self.policy_in_force.method, self.plan.pages(longest)
        if not method.bounded:
            return whole
        engine = Engine(self.plan, len(self.layers), longest, room=None)
        spans = [span_of(method, engine, prompt) for prompt in (1, longest)]
        return min(whole, max(span.most_pages(longest) for span in spans))

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        # Pages given back keep their place in the row; what was kept follows them.
        return self.plan.pages(max_len) + self.plan.store_pages(max_len) + 1


# Registering alone would leave out vLLM's own specs, which register themselves only when the
# registry is still empty. Can go when register() does this itself.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(
    RingStoreSpec, RingStoreManager, uniform_type_base_spec=FullAttentionSpec
)
