"""The GPU's side: a backend registered by name, chosen for full-attention layers under a policy.

Nothing here has run on a GPU. Unlike on a CPU, vLLM chooses a backend for each kind of layer, so no
stock object is stood in for, and a server without a policy never meets this module.
"""

from __future__ import annotations

import time
import weakref
from typing import TYPE_CHECKING, Any, ClassVar

from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, MultipleOf
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_layout import KVCacheLayout

from cache_policies.errors import PolicyError
from cache_policies.kernels import kernel_class
from cache_policies.pages.codecs.base import HEAD_SIZES, MODEL_DTYPES, PAGE_STEP
from cache_policies.retrieval import SparsePrefill
from cache_policies.vllm_plugin import BLOCK_SIZE, FULL_ATTENTION
from cache_policies.vllm_plugin.backend import EdgeBackend, RingStoreBackend, RingStoreImpl
from cache_policies.vllm_plugin.builder import RingStoreMetadataBuilder
from cache_policies.vllm_plugin.config import KERNEL_KEY, settings, takes_methods
from cache_policies.vllm_plugin.kinds import is_full_attention, kinds_of, next_layer

if TYPE_CHECKING:
    import argparse

    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec

    from cache_policies.kernels.contract import Shape
    from cache_policies.pages.layout import PageLayout
    from cache_policies.vllm_plugin.spec import RingStoreSpec

GPU_KERNELS = ("auto", "triton")

# vLLM shows only loggers below its own name.
logger = init_logger("vllm.kvthrift")


class GpuBackend(AttentionBackend):  # type: ignore[misc]
    """Triton's kernels over our pages."""

    supported_dtypes: ClassVar[list[torch.dtype]] = list(MODEL_DTYPES)
    # Of these ``refuse_engine`` takes the model's own.
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]
    edge = False

    @staticmethod
    def get_name() -> str:
        return AttentionBackendEnum.CUSTOM.name

    @classmethod
    def get_impl_cls(cls) -> type[AttentionImpl]:
        # vLLM derives a backend for chunked local attention from that of full attention.
        if cls.__name__.startswith("ChunkedLocalAttention"):
            config = get_current_vllm_config()
            raise PolicyError(
                f"a cache policy on a GPU cannot serve chunked local attention; layer "
                f"{next_layer(config)} of {config.model_config.model} has it; drop --cache-policy"
            )
        return GpuImpl

    @staticmethod
    def get_builder_cls() -> type[GpuMetadataBuilder]:
        return GpuMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(PAGE_STEP)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:  # noqa: ARG003
        return BLOCK_SIZE

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_SIZES)

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Those in which the bytes of a head lie together in a page, wherever the page lies.

        The kernels take strides of pages and heads; in other layouts a view of bytes would be a
        copy, and what is written to it would be lost. Beside windows there is one in which vLLM
        packs pages of unlike sizes: other backends would vote down a mere preference for it.
        """
        config = RingStoreImpl.config_in_use()
        if config is not None and kinds_of(config).packed:
            return (KVCacheLayout.BLHNC,)
        layouts = (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC, KVCacheLayout.LHBNC)
        return (*layouts, KVCacheLayout.BHLNC)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        return (EdgeBackend if cls.edge else RingStoreBackend).customize_spec(spec)


class GpuEdgeBackend(GpuBackend):
    """The same for first and last layers that have another codec."""

    edge = True


class GpuMetadataBuilder(RingStoreMetadataBuilder):
    """The same; its layers' kernels are compiled when it is made.

    Both model runners make one for alike layers as they start, before they allocate the cache.

    Raises:
        PolicyError: a kernel does not compile, or the GPU cannot take it.

    """

    def __init__(
        self,
        kv_cache_spec: RingStoreSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        modules = vllm_config.compilation_config.static_forward_context
        layers = [modules[name] for name in layer_names]
        _warm_up([x.impl.form(x, kv_cache_spec.block_size) for x in layers], vllm_config)


def _warm_up(layers: list[tuple[PageLayout, Shape]], vllm_config: VllmConfig) -> None:
    """Compile the kernels of a policy and, where requests may choose one, those of all methods."""
    asked = settings(vllm_config)
    assert asked is not None
    if kernel_class(asked.kernel).name != "triton":  # where torch finds no GPU, in tests
        return
    from cache_policies.kernels.triton.warm import warm_up  # imports Triton

    prefills = {SparsePrefill(), asked.policy.method.prefill or SparsePrefill()}
    samples = {prefill.samples for prefill in prefills} if takes_methods(vllm_config) else None
    begin = time.perf_counter()
    count = warm_up(layers, samples)
    if count:
        seconds = time.perf_counter() - begin
        logger.info("kvthrift: %d Triton kernels are ready after %.1f s", count, seconds)


class GpuImpl(RingStoreImpl):
    """Attention of one layer on a GPU."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Ours; there is no stock implementation behind this name."""
        vllm_config = get_current_vllm_config()
        asked = settings(vllm_config)
        if asked is None:
            raise PolicyError(
                "the attention backend CUSTOM is kvthrift's and needs a cache policy; drop "
                "--attention-config, or give --cache-policy"
            )
        refuse_kernel(asked.kernel)
        if not is_full_attention(*args, **kwargs):
            raise PolicyError(
                f"a cache policy on a GPU cannot serve {vllm_config.model_config.model}, which has "
                "a layer with a sliding window that vLLM takes for full attention; drop the policy"
            )
        RingStoreImpl.config_in_use, RingStoreImpl.asked = weakref.ref(vllm_config), asked
        return AttentionImpl.__new__(cls)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        super().process_weights_after_loading(act_dtype)
        for module in self._modules.values():
            if getattr(module, "attn_backend", None) is EdgeBackend:
                module.attn_backend = GpuEdgeBackend


def refuse_kernel(kernel: str | None) -> None:
    """Refuse a kernel that a GPU's tensors are not for.

    Raises:
        PolicyError: naming those that are.

    """
    if kernel not in {None, *GPU_KERNELS}:
        raise PolicyError(
            f"{KERNEL_KEY}={kernel} is not for GPUs; choose one of {', '.join(GPU_KERNELS)}"
        )


def choose_backend(args: argparse.Namespace) -> None:
    """Make vLLM take our backend for full-attention layers, and pages of ``BLOCK_SIZE`` tokens.

    Args:
        args: vLLM's arguments, changed in place.

    Raises:
        PolicyError: another backend was asked for, or a kernel that is not for GPUs.

    """
    given = (args.additional_config or {}).get(KERNEL_KEY)
    refuse_kernel(getattr(args, "cache_kernel", None) or given)
    asked = args.attention_config
    other = getattr(args, "attention_backend", None) or asked.backend
    other = asked.backend_per_kind.get(FULL_ATTENTION, other)
    if other not in {None, AttentionBackendEnum.CUSTOM}:
        name = getattr(other, "name", other)
        raise PolicyError(
            f"--cache-policy brings its own attention backend; drop {name} from "
            "--attention-backend or --attention-config"
        )
    asked.backend_per_kind = asked.backend_per_kind | {FULL_ATTENTION: AttentionBackendEnum.CUSTOM}
    if args.block_size is None:
        args.block_size = BLOCK_SIZE
