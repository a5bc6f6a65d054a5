"""Attention layers of vLLM with a GPU's backend, and steps as vLLM tells builders of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import FullAttentionSpec

from cache_policies.vllm_plugin.builder import RingStoreMetadataBuilder
from cache_policies.vllm_plugin.cuda import GpuBackend

try:
    from vllm.v1.core import kv_cache_planning as planning
except ImportError:  # vLLM 0.32
    from vllm.v1.core import kv_cache_utils as planning  # noqa: F401  # for the tests

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_layout import KVCacheLayout

    from cache_policies.vllm_plugin.spec import RingStoreSpec

CPU = torch.device("cpu")
HEADS, KV_HEADS, SIZE = 4, 2, 64


class Windows(CPUAttentionBackend):  # type: ignore[misc]
    """The backend of other layers, as FlashAttention: it takes any layout."""

    declared: tuple[KVCacheLayout, ...] | None = None

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...] | None:  # type: ignore[override]
        return cls.declared


def layer(config: VllmConfig, number: int, backend: Any = GpuBackend, **options: Any) -> Attention:
    """A layer of a model that is being made."""
    with set_current_vllm_config(config):
        return Attention(
            HEADS, SIZE, SIZE**-0.5, num_kv_heads=KV_HEADS, cache_config=config.cache_config,
            prefix=f"model.layers.{number}.self_attn.attn", attn_backend=backend, **options,
        )  # fmt: skip


def window(config: VllmConfig, number: int) -> Attention:
    return layer(config, number, Windows, per_layer_sliding_window=512)


def spec_of(attention: Attention, config: VllmConfig) -> RingStoreSpec:
    spec = attention.get_kv_cache_spec(config)
    assert isinstance(spec, FullAttentionSpec)
    found: RingStoreSpec = GpuBackend.customize_spec(spec)
    return found


def builder_of(attention: Attention, config: VllmConfig) -> RingStoreMetadataBuilder:
    config.cache_config.num_gpu_blocks = 100
    spec = spec_of(attention, config)
    return RingStoreMetadataBuilder(spec, [attention.layer_name], config, CPU)


def batch(
    fresh: list[int], lengths: list[int], slots: list[int] | None, *, prefilling: bool = True
) -> CommonAttentionMetadata:
    """A step as vLLM tells builders of it."""
    start = torch.tensor([0, *np.cumsum(fresh)], dtype=torch.int32)
    length, count = torch.tensor(lengths, dtype=torch.int32), len(fresh)
    return CommonAttentionMetadata(
        query_start_loc=start, query_start_loc_cpu=start, seq_lens=length,
        seq_lens_cpu_upper_bound=length, num_reqs=count, num_actual_tokens=sum(fresh),
        max_query_len=max(fresh), max_seq_len=max(lengths),
        block_table_tensor=torch.arange(1, 1 + 8 * count, dtype=torch.int32).view(count, 8),
        slot_mapping=torch.zeros(sum(fresh), dtype=torch.int64),
        is_prefilling=torch.full((count,), prefilling),
        req_idx=None if slots is None else np.array(slots),
    )  # fmt: skip
