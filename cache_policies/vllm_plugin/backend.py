"""The workers' side: attention over ring and store pages.

The CPU platform knows a single backend, so this one serves every layer: full-attention
decoder layers under a policy are ours, all others get vLLM's stock objects.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
)
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec

from cache_policies.errors import PolicyError
from cache_policies.kernels import kernel_class
from cache_policies.kernels.contract import Batch, Shape
from cache_policies.kernels.counts import Buffers
from cache_policies.policy.layouts import is_edge, layouts
from cache_policies.step.clock import Clock
from cache_policies.step.cut import Layer, Tokens
from cache_policies.step.step import Step
from cache_policies.vllm_plugin.config import Settings, refuse_engine, settings
from cache_policies.vllm_plugin.heap import HeapTrimmer
from cache_policies.vllm_plugin.metrics import cache_seconds
from cache_policies.vllm_plugin.rotary import rope_of, watch
from cache_policies.vllm_plugin.rows import rows_of
from cache_policies.vllm_plugin.spec import RingStoreSpec

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import AttentionSpec

    from cache_policies.pages.layout import PageLayout
    from cache_policies.step.request import RequestState


# vLLM shows only loggers below its own name.
logger = init_logger("vllm.kvthrift")


class RingStoreBackend(CPUAttentionBackend):  # type: ignore[misc]
    """vLLM's CPU backend, with our objects for the layers that are ours."""

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        return RingStoreImpl

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:
        return RingStoreMetadataBuilder

    edge = False

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        policy = RingStoreImpl.policy_in_use
        if policy is None or type(spec) is not FullAttentionSpec or spec.sliding_window:
            return spec
        return RingStoreSpec.of(spec, policy, RingStoreImpl.layers_in_use, edge=cls.edge)


class EdgeBackend(RingStoreBackend):
    """The same for first and last layers that have another codec."""

    edge = True


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

    def __new__(cls, kv_cache_spec: AttentionSpec, *args: Any, **kwargs: Any) -> Any:
        """Our builder for our specs, the stock one for the others."""
        if isinstance(kv_cache_spec, RingStoreSpec):
            return super().__new__(cls)
        return CPUAttentionMetadataBuilder(kv_cache_spec, *args, **kwargs)

    def __init__(
        self,
        kv_cache_spec: RingStoreSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.plan = kv_cache_spec.plan
        self.buffers = Buffers(device)
        self.rows = rows_of(vllm_config)
        self.rows.plan = self.plan

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> RingStoreMetadata:
        assert common_prefix_len == 0
        count = common_attn_metadata.num_reqs
        start = common_attn_metadata.query_start_loc_cpu[: count + 1].numpy()
        # V2's ``seq_lens`` is the device's; this one is exact without speculative decoding.
        exact = common_attn_metadata.seq_lens_cpu_upper_bound
        lengths = (common_attn_metadata.seq_lens if exact is None else exact)[:count].numpy()
        computed = lengths - (start[1:] - start[:-1])
        table = common_attn_metadata.block_table_tensor[:count]
        fresh = common_attn_metadata.num_actual_tokens
        states = self._states(common_attn_metadata, computed.tolist())
        self.buffers.begin_step()
        if all(state is None for state in states):
            batch = Batch.of(self.plan, start, computed, table, self.buffers)
            return RingStoreMetadata(batch, None, fresh)
        for state, before, after in zip(states, computed.tolist(), lengths.tolist(), strict=True):
            if state is not None:
                state.advance(before, after)
        step = Step(self.plan, start, computed, states, table, self.buffers)
        return RingStoreMetadata(None, step, fresh)

    def _states(
        self, common: CommonAttentionMetadata, computed: list[int]
    ) -> list[RequestState | None]:
        if common.req_idx is None:  # the V1 runner
            return [self.rows.state(row) for row in range(len(computed))]
        states: list[RequestState | None] = [None] * len(computed)
        for row, slot in enumerate(common.req_idx.tolist()):
            # Dummy batches of V2 use the slots of real requests.
            if computed[row] or common.is_prefilling[row]:
                states[row] = self.rows.state(slot)
        return states


class RingStoreImpl(AttentionImpl):  # type: ignore[misc]
    """Attention of one layer that is ours."""

    policy_in_use: str | None = None  # of this process; set when the first layer is made
    layers_in_use = 0

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Our implementation for our layers, the stock one for the others."""
        vllm_config = get_current_vllm_config()
        asked = settings(vllm_config)
        cls.policy_in_use = str(asked.policy) if asked else None
        cls.layers_in_use = vllm_config.model_config.get_total_num_hidden_layers()
        if asked is not None and _is_full_attention(*args, **kwargs):
            return super().__new__(cls)
        if asked is not None and asked.policy.edges:
            raise PolicyError(
                "a cache policy with layers(...) cannot serve a model with layers of another kind "
                f"than full attention; layer {_next_layer(vllm_config)} is one"
            )
        return CPUAttentionBackendImpl(*args, **kwargs)

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **unknown: Any,
    ) -> None:
        vllm_config = get_current_vllm_config()
        refuse_engine(vllm_config)
        features = {
            "ALiBi": alibi_slopes,
            "a logits soft cap": logits_soft_cap,
            "attention sinks learned by the model": sinks,
            "KV caches shared between layers": kv_sharing_target_layer_name,
            **unknown,
        }
        for feature, value in features.items():
            if value is not None and (not isinstance(value, (int, float)) or value):
                raise PolicyError(
                    f"a cache policy cannot serve layers with {feature}; "
                    f"layer {_next_layer(vllm_config)} is one"
                )
        asked = settings(vllm_config)
        assert asked is not None
        self.settings: Settings = asked
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_size, self.scale = head_size, float(scale)
        self.model_dtype = vllm_config.model_config.dtype
        self.shape = Shape(num_heads, num_kv_heads, float(scale))
        self._kernel_class = kernel_class(asked.kernel)
        self._layer: Layer | None = None
        self._vllm_config = vllm_config
        watch()
        self._modules = vllm_config.compilation_config.static_forward_context
        logger.info_once(
            "kvthrift: cache policy %s, attention kernel %s",
            str(asked.policy),
            self._kernel_class.summary(),
        )
        # Refuses a head size or group now rather than in the first step.
        self._layouts(vllm_config.cache_config.block_size)
        self._is_edge(0)

    def _layouts(self, page_tokens: int) -> tuple[PageLayout, PageLayout]:
        packing = self._kernel_class.packing
        return layouts(self.settings.policy, self.head_size, page_tokens, self.model_dtype, packing)

    def _is_edge(self, index: int) -> bool:
        return is_edge(self.settings.policy, index, self.layers_in_use)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Give an edge layer its backend, before vLLM asks the backend for the layer's pages.

        A backend is not told which layer it is asked about. Can go when it is.
        """
        del act_dtype
        for name, module in self._modules.items():
            if getattr(module, "impl", None) is self and self._is_edge(extract_layer_index(name)):
                module.attn_backend = EdgeBackend

    def do_kv_cache_update(self, *_: Any) -> None:
        """Nothing: ``forward`` writes after it has attended, for the ring is overwritten."""

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: RingStoreMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend, then append.

        Args:
            layer: the vLLM layer.
            query: ``[num_tokens, num_heads, head_size]``.
            key: ``[num_tokens, num_kv_heads, head_size]``.
            value: same shape as ``key``.
            kv_cache: ``[num_pages, num_kv_heads, page_tokens, bytes per token]`` uint8.
            attn_metadata: the step; None while warming up.
            output: same shape as ``query``, written.
            output_scale: must be None.
            output_block_scale: must be None.

        """
        assert output_scale is None
        assert output_block_scale is None
        if attn_metadata is None:
            return output
        count = attn_metadata.num_tokens
        if self._layer is None or self._layer.pages.data_ptr() != kv_cache.data_ptr():
            self._layer = self._make_layer(layer, kv_cache)
        if _clock.begins_step(self._layer.index):
            cache_seconds(_clock)
            _trim_heap()
        tokens = Tokens(query[:count], key[:count], value[:count])
        if attn_metadata.step is not None:
            attn_metadata.step.run(self._layer, tokens, output[:count])
        else:
            assert attn_metadata.batch is not None
            _plain_step(self._layer, attn_metadata.batch, tokens, output[:count])
        return output

    def _make_layer(self, layer: torch.nn.Module, kv_cache: torch.Tensor) -> Layer:
        index = extract_layer_index(layer.layer_name)
        layout = self._layouts(kv_cache.shape[2])[self._is_edge(index)]
        return Layer(
            index=index,
            layers=self._vllm_config.model_config.get_total_num_hidden_layers(),
            layout=layout,
            kernel=self._kernel_class(layout, self.shape),
            pages=kv_cache.flatten(2),
            rope=rope_of(layer, self.head_size, self._vllm_config),
            scale=self.scale,
            clock=_clock,
        )


_clock = Clock()  # of all layers of this worker
_trim_heap = HeapTrimmer()


def _plain_step(layer: Layer, batch: Batch, tokens: Tokens, output: torch.Tensor) -> None:
    """A step in which no request drops or chooses anything."""
    layer.clock.start()
    layer.kernel.attend(layer.pages, batch, *tokens, output)
    layer.clock.lap("attend")
    layer.kernel.append(layer.pages, batch, tokens.key, tokens.value)
    layer.clock.lap("append")


def _next_layer(vllm_config: VllmConfig) -> int:
    """Number of the attention layer that is being made; vLLM registers it afterwards."""
    made = vllm_config.compilation_config.static_forward_context.values()
    return sum(hasattr(module, "impl") for module in made)  # others than attention are in it too


def _is_full_attention(
    num_heads: int,  # noqa: ARG001
    head_size: int,  # noqa: ARG001
    scale: float,  # noqa: ARG001
    num_kv_heads: int,  # noqa: ARG001
    alibi_slopes: list[float] | None = None,  # noqa: ARG001
    sliding_window: int | None = None,
    kv_cache_dtype: str = "auto",  # noqa: ARG001
    logits_soft_cap: float | None = None,  # noqa: ARG001
    attn_type: str = AttentionType.DECODER,
    *_: Any,
    **__: Any,
) -> bool:
    """Whether a layer with these arguments of an attention implementation is ours."""
    return sliding_window is None and attn_type == AttentionType.DECODER
