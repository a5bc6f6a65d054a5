"""vLLM's own attention: layers with windows or chunks, beside layers of other kinds.

Blocks go from layer to layer, so a block that a window takes may hold codes or a recurrence's
float32 states, which read as numbers of the window's type may be NaN. vLLM's kernel reads whole
blocks and weighs what it must not see with 0, which a NaN survives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder

from cache_policies.vllm_plugin.config import settings
from cache_policies.vllm_plugin.kinds import kinds_of, refuse_other_layers

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata
    from vllm.v1.kv_cache_interface import AttentionSpec


class StockBuilder(CPUAttentionMetadataBuilder):  # type: ignore[misc]
    """vLLM's builder, which zeroes the blocks that begin in a step where others use them too.

    Can go when vLLM's CPU runner zeroes new blocks of packed groups and of windows
    (``_zero_block_ids``).
    """

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        policy, kinds = settings(vllm_config) is not None, kinds_of(vllm_config)
        if policy:
            refuse_other_layers(vllm_config)
        beside = policy or bool(kinds.states and kinds.windows)
        self._zeroes = beside and not self.is_encoder_only_attention
        modules = vllm_config.compilation_config.static_forward_context
        self._layers = [modules[name] for name in layer_names if name in modules]

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUAttentionMetadata:
        if self._zeroes:
            self._zero(common_attn_metadata)
        return super().build(common_prefix_len, common_attn_metadata, fast_build)

    def _zero(self, common: CommonAttentionMetadata) -> None:
        count, size = common.num_reqs, self.block_size
        start = common.query_start_loc_cpu[: count + 1]
        after = common.seq_lens[:count]
        before = after - (start[1:] - start[:-1])
        first, end = -(-before // size), -(-after // size)
        for row in (end > first).nonzero().flatten().tolist():
            blocks = common.block_table_tensor[row, int(first[row]) : int(end[row])]
            for layer in self._layers:
                pages: Any = layer.kv_cache
                pages[blocks.long()] = 0
