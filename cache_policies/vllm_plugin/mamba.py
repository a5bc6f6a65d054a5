"""State-space layers of vLLM on a CPU, with what their prefix cache needs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot
from vllm.model_executor.layers.mamba.mamba_mixer import MambaMixer
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.v1.kv_cache_interface import MambaSpec

from cache_policies.errors import PolicyError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec

SCAN = "selective_scan_fwd"


class ChunkEndMixer2(MambaMixer2):  # type: ignore[misc]
    """Mamba 2 whose states are taken at the ends of chunks, to which the scheduler keeps.

    vLLM's takes them inside of a chunk too, for which its CPU operator has no output: with prefix
    caching the first prompt longer than a block is an IndexError. Can go when the operator
    returns intermediate states.
    """

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        spec = super().get_kv_cache_spec(vllm_config)
        if not isinstance(spec, MambaSpec):
            return spec
        return replace(spec, num_prefill_checkpoint_blocks=0, prefill_checkpoint_alignment=None)


class MissingMixer(MambaMixer):  # type: ignore[misc]
    """Mamba 1, where this build of vLLM lacks its operator: refused instead of failing later."""

    def __init__(self, *_: Any, prefix: str = "", **__: Any) -> None:
        raise PolicyError(
            f"layer {prefix} is of Mamba 1, whose scan (_C::selective_scan_fwd) vLLM's build for "
            "CPUs lacks; hybrids with Mamba 2 layers can be served"
        )


def register_layers() -> None:
    """Put our layers in the place of vLLM's, in a worker and before its model is made."""
    if MambaMixer2.__name__ not in op_registry_oot:
        PluggableLayer.register_oot(ChunkEndMixer2, name=MambaMixer2.__name__)
    if MambaMixer.__name__ not in op_registry_oot and not hasattr(torch.ops._C, SCAN):
        PluggableLayer.register_oot(MissingMixer, name=MambaMixer.__name__)
