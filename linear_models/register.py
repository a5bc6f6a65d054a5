"""What vLLM is told of this package; light, for it runs in every process before a model exists.

``register`` names architectures by the address of their class, which vLLM imports when a model
asks for it. ``register_layers`` runs in a worker, before its model is made.
"""

from __future__ import annotations

# architecture of a config.json -> module:class
ARCHITECTURES: dict[str, str] = {
    "RecurrentGemmaForCausalLM": "linear_models.recurrent_gemma:RecurrentGemmaForCausalLM",
    "Rwkv5ForCausalLM": "linear_models.rwkv5:Rwkv5ForCausalLM",
    "RWKV7ForCausalLM": "linear_models.rwkv7:Rwkv7ForCausalLM",
}
ATTENTION_FREE = (
    "Rwkv5ForCausalLM",
    "RWKV7ForCausalLM",
)  # vLLM sizes the states of others by itself


def register() -> None:
    """Tell vLLM of our architectures, on a CPU. A server without such a model is untouched."""
    from vllm.platforms import current_platform

    if not ARCHITECTURES or not current_platform.is_cpu():
        return
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from linear_models.configs import register_configs
    from linear_models.limits import BesideAttention, WithoutAttention

    register_configs()
    for name, address in ARCHITECTURES.items():
        MODELS_CONFIG_MAP[name] = WithoutAttention if name in ATTENTION_FREE else BesideAttention
        ModelRegistry.register_model(name, address)


def register_layers() -> None:
    """Put our Mamba 1 layer in the place of vLLM's, where that lacks its scan."""
    import torch
    from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot

    name = "MambaMixer"
    if name in op_registry_oot or hasattr(torch.ops._C, "selective_scan_fwd"):
        return
    from linear_models.mamba1 import CpuMambaMixer

    PluggableLayer.register_oot(CpuMambaMixer, name=name)
