"""What the layers of a step are told: vLLM's view of its batch, in the kernels' terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionMetadataBuilder

from cache_policies.kernels.contract import Batch
from cache_policies.kernels.counts import Buffers
from cache_policies.step.step import Step
from cache_policies.vllm_plugin.kinds import kinds_of, refuse_other_layers
from cache_policies.vllm_plugin.rows import rows_of
from cache_policies.vllm_plugin.spec import RingStoreSpec
from cache_policies.vllm_plugin.stock import StockBuilder

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import AttentionSpec

    from cache_policies.step.request import RequestState


@dataclass
class RingStoreMetadata:
    """One step: the batch in the kernels' terms.

    Attributes:
        batch: counts and block table, where every request is plain.
        step: the batch where one is not.
        num_tokens: fresh tokens, without padding.

    """

    batch: Batch | None
    step: Step | None
    num_tokens: int


class RingStoreMetadataBuilder(AttentionMetadataBuilder):  # type: ignore[misc]
    """Applies the plan to vLLM's view of a step."""

    def __init__(
        self,
        kv_cache_spec: RingStoreSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        refuse_other_layers(vllm_config)
        _forget_pages(vllm_config, layer_names, device)
        self.plan = kv_cache_spec.plan
        self.v2 = vllm_config.use_v2_model_runner
        self.buffers = Buffers(device)
        self.rows = rows_of(vllm_config)
        self.rows.plan, self.rows.layers = self.plan, len(kv_cache_spec.layers)
        # Of several groups of ours one tells the requests of a step.
        first = min(extract_layer_index(name) for name in layer_names)
        self.leads = first == kinds_of(vllm_config).ours[0]

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> RingStoreMetadata | None:
        """Counts of a step; None: no layer attends or writes, see ``_is_dummy``."""
        assert common_prefix_len == 0
        count = common_attn_metadata.num_reqs
        start = common_attn_metadata.query_start_loc_cpu[: count + 1].numpy()
        # V2's ``seq_lens`` is the device's; this one is exact without speculative decoding.
        exact = common_attn_metadata.seq_lens_cpu_upper_bound
        lengths = (common_attn_metadata.seq_lens if exact is None else exact)[:count].numpy()
        computed = lengths - (start[1:] - start[:-1])
        if self._is_dummy(common_attn_metadata, computed):
            return None
        table = common_attn_metadata.block_table_tensor[:count]
        fresh = common_attn_metadata.num_actual_tokens
        states = self._states(common_attn_metadata, computed.tolist())
        self.buffers.begin_step()
        if all(state is None for state in states):
            batch = Batch.of(self.plan, start, computed, table, self.buffers)
            return RingStoreMetadata(batch, None, fresh)
        for state, before, after in zip(states, computed.tolist(), lengths.tolist(), strict=True):
            if state is not None and self.leads:
                state.advance(before, after)
        step = Step(self.plan, start, computed, states, table, self.buffers)
        return RingStoreMetadata(None, step, fresh)

    def _is_dummy(self, common: CommonAttentionMetadata, computed: Any) -> bool:
        """Whether V2 only warms up, captures or idles.

        Then every block is the null block, of which windows beside our layers read what they mask:
        our codes may be NaN in their type.
        """
        if not self.v2 or common.is_prefilling is None:
            return False
        return not (computed.any() or common.is_prefilling.any())

    def _states(
        self, common: CommonAttentionMetadata, computed: list[int]
    ) -> list[RequestState | None]:
        if not self.v2:
            return [self.rows.state(row) for row in range(len(computed))]
        states: list[RequestState | None] = [None] * len(computed)
        if common.req_idx is None:  # a model under which no method runs, see ``refuse_method``
            return states
        for row, slot in enumerate(common.req_idx.tolist()):
            # Dummy batches of V2 use the slots of real requests.
            if computed[row] or common.is_prefilling[row]:
                states[row] = self.rows.state(slot)
        return states


def _forget_pages(vllm_config: VllmConfig, names: list[str], device: torch.device) -> None:
    """Let go of an earlier cache; vLLM makes builders before it allocates another.

    The first one is that of graph profiling, whose memory the second one takes. Its addresses too:
    a layer that knew the old pages would take the new ones for them.
    """
    modules = vllm_config.compilation_config.static_forward_context
    for name in names:
        modules[name].impl.forget_pages()
    if device.type == "cuda":
        torch.accelerator.empty_cache()


class BuilderOfSpec(StockBuilder):
    """Our builder for our specs; models derive builders for other specs from the stock one."""

    def __new__(cls, kv_cache_spec: AttentionSpec, *args: Any, **kwargs: Any) -> Any:
        if isinstance(kv_cache_spec, RingStoreSpec):
            return RingStoreMetadataBuilder(kv_cache_spec, *args, **kwargs)
        return super().__new__(cls)
