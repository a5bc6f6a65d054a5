"""The workers' side: attention over ring and store pages.

The CPU platform knows a single backend, so this one serves every layer: full-attention
decoder layers under a policy are ours, all others get vLLM's stock objects.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionImpl, AttentionType
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout

from cache_policies.errors import PolicyError
from cache_policies.kernels import kernel_class
from cache_policies.kernels.contract import Shape
from cache_policies.policy.layouts import is_edge, layouts
from cache_policies.step.clock import Clock
from cache_policies.step.cut import Layer, Tokens
from cache_policies.vllm_plugin import BLOCK_SIZE
from cache_policies.vllm_plugin.builder import BuilderOfSpec, RingStoreMetadata
from cache_policies.vllm_plugin.config import Settings, refuse_engine, settings
from cache_policies.vllm_plugin.heap import HeapTrimmer
from cache_policies.vllm_plugin.key_bias import key_offset, warn_of_bias
from cache_policies.vllm_plugin.kinds import (
    ONE_KIND,
    is_full_attention,
    kinds_of,
    next_layer,
    policy_layers,
)
from cache_policies.vllm_plugin.metrics import cache_seconds
from cache_policies.vllm_plugin.rotary import rope_of, watch
from cache_policies.vllm_plugin.spec import RingStoreSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import AttentionMetadataBuilder
    from vllm.v1.kv_cache_interface import AttentionSpec

    from cache_policies.kernels.contract import Batch
    from cache_policies.pages.layout import PageLayout


# vLLM shows only loggers below its own name.
logger = init_logger("vllm.kvthrift")


class RingStoreBackend(CPUAttentionBackend):  # type: ignore[misc]
    """vLLM's CPU backend, with our objects for the layers that are ours."""

    @classmethod
    def get_impl_cls(cls) -> type[AttentionImpl]:
        # vLLM derives a backend for chunked local attention, which is not ours to serve.
        chunked = cls.__name__.startswith("ChunkedLocalAttention")
        return CPUAttentionBackendImpl if chunked else RingStoreImpl

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:
        return BuilderOfSpec

    edge = False

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Block-outermost first where that lets vLLM pack pages of unlike sizes."""
        config = RingStoreImpl.config_in_use()
        packed = config is not None and kinds_of(config).packed
        stock: tuple[KVCacheLayout, ...] = super().supported_kv_cache_layouts()
        return (KVCacheLayout.BLHNC, *stock) if packed else stock

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        config, asked = RingStoreImpl.config_in_use(), RingStoreImpl.asked
        if config is None or asked is None or type(spec) is not FullAttentionSpec:
            return spec
        if spec.sliding_window or spec.attention_chunk_size:
            return spec
        if spec.non_causal:
            raise PolicyError(
                "a cache policy cannot serve prompts that attend in both directions, as "
                f"{config.model_config.model} does; drop the policy"
            )
        block = config.cache_config.block_size
        inner, _ = layouts(asked.policy, spec.head_size, block, spec.dtype)
        token_bytes = inner.head_bytes // block  # the same for every multiple of the block
        if spec.block_size == 1:  # vLLM asks what a token takes, to fit blocks to constant states
            return replace(spec, state_content_bytes=token_bytes)
        tokens = kinds_of(config).page_tokens(block, token_bytes * spec.num_kv_heads)
        spec = replace(spec, block_size=tokens)
        return RingStoreSpec.of(spec, str(asked.policy), policy_layers(config), edge=cls.edge)


class EdgeBackend(RingStoreBackend):
    """The same for first and last layers that have another codec."""

    edge = True


def _no_config() -> VllmConfig | None:
    return None


class RingStoreImpl(AttentionImpl):  # type: ignore[misc]
    """Attention of one layer that is ours."""

    is_ours = True
    kv_cache_dtype = "auto"  # any other is refused
    # of this process's engine; set when a layer is made, for a backend is told neither
    config_in_use: Callable[[], VllmConfig | None] = _no_config
    asked: Settings | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Our implementation for our layers, the stock one for the others."""
        vllm_config = get_current_vllm_config()
        asked = settings(vllm_config)
        cls.config_in_use, cls.asked = weakref.ref(vllm_config), asked
        if asked is not None and is_full_attention(*args, **kwargs):
            return super().__new__(cls)
        if asked is not None and asked.policy.edges:
            raise PolicyError(f"{ONE_KIND}; layer {next_layer(vllm_config)} is one")
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
            "KV caches shared between layers": kv_sharing_target_layer_name,
            **unknown,
        }
        for feature, value in features.items():
            if value is not None and (not isinstance(value, (int, float)) or value):
                raise PolicyError(
                    f"a cache policy cannot serve layers with {feature}; "
                    f"layer {next_layer(vllm_config)} is one"
                )
        asked = settings(vllm_config)
        assert asked is not None
        if asked.policy.edges and vllm_config.model_config.is_hybrid:
            raise PolicyError(f"{ONE_KIND}; {vllm_config.model_config.model} has")
        self.settings: Settings = asked
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_size, self.scale = head_size, float(scale)
        self.model_dtype = vllm_config.model_config.dtype
        self.shape = Shape(
            num_heads,
            num_kv_heads,
            float(scale),
            soft_cap=logits_soft_cap or 0.0,
            sinks=sinks,
        )
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
        # Refuses a head size, group or codec now rather than in the first step.
        # vLLM chooses a block's size after it has made the layers; 0.32's CPU platform did before.
        cache = vllm_config.cache_config
        size = cache.block_size if cache.user_specified_block_size else BLOCK_SIZE
        try:
            for layout in self._layouts(size):
                self._kernel_class(layout, self.shape)
        except PolicyError as error:
            raise PolicyError(f"layer {next_layer(vllm_config)}: {error}") from None
        self._is_edge(0)

    def _layouts(self, page_tokens: int) -> tuple[PageLayout, PageLayout]:
        packing = self._kernel_class.packing
        return layouts(self.settings.policy, self.head_size, page_tokens, self.model_dtype, packing)

    def _is_edge(self, index: int) -> bool:
        layers = self._vllm_config.model_config.get_total_num_hidden_layers()
        return is_edge(self.settings.policy, index, layers)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Give an edge layer its backend, before vLLM asks the backend for the layer's pages.

        And warn of key biases that the layer's codec does not stand.

        A backend is not told which layer it is asked about. Can go when it is.
        """
        del act_dtype
        for name, module in self._modules.items():
            if getattr(module, "impl", None) is not self:
                continue
            index, policy = extract_layer_index(name), self.settings.policy
            codec = policy.codec
            if policy.edges and self._is_edge(index):
                module.attn_backend, codec = EdgeBackend, policy.edges.built
            warn_of_bias(module, codec, self._vllm_config, index)

    def forget_pages(self) -> None:
        """Let go of the pages; the next step has others."""
        self._layer = None

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
            return output.fill_(0)
        count = attn_metadata.num_tokens
        if self._layer is None or self._layer.pages.data_ptr() != kv_cache.data_ptr():
            self._layer = self._make_layer(layer, kv_cache)
        if _clock.begins_step(self._layer.index):
            cache_seconds(_clock)
            if kv_cache.device.type == "cpu":
                _trim_heap()
        tokens = Tokens(query[:count], key[:count], value[:count])
        if attn_metadata.step is not None:
            attn_metadata.step.run(self._layer, tokens, output[:count])
        else:
            assert attn_metadata.batch is not None
            _plain_step(self._layer, attn_metadata.batch, tokens, output[:count])
        return output

    def form(self, layer: torch.nn.Module, page_tokens: int) -> tuple[PageLayout, Shape]:
        """Pages and heads of the vLLM layer, from which its kernel is made."""
        number = extract_layer_index(layer.layer_name)
        layout = self._layouts(page_tokens)[self._is_edge(number)]
        offset = key_offset(layer, layout.codec, self._vllm_config)
        return layout, replace(self.shape, key_offset=offset)

    def _make_layer(self, layer: torch.nn.Module, kv_cache: torch.Tensor) -> Layer:
        number, numbers = extract_layer_index(layer.layer_name), policy_layers(self._vllm_config)
        layout, shape = self.form(layer, kv_cache.shape[2])
        return Layer(
            index=numbers.index(number),
            layers=len(numbers),
            layout=layout,
            kernel=self._kernel_class(layout, shape),
            pages=kv_cache.flatten(2),
            rope=rope_of(layer, self.head_size, self._vllm_config, kv_cache.device),
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
