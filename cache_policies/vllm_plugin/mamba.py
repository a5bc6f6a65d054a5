"""State-space layers of vLLM on a CPU, with what their prefix cache needs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.v1.kv_cache_interface import MambaSpec

import linear_models.register

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec


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


def register_layers() -> None:
    """Put our layers in the place of vLLM's, in a worker and before its model is made."""
    if MambaMixer2.__name__ not in op_registry_oot:
        PluggableLayer.register_oot(ChunkEndMixer2, name=MambaMixer2.__name__)
    linear_models.register.register_layers()
