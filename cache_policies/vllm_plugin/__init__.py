"""The folder of ``cache_policies`` that imports vLLM's internals (0.32 and 0.33; see ``versions``).

``register`` is the entry point ``vllm.general_plugins``; vLLM calls it in every process,
before any configuration exists. It stays light: vLLM only logs an import error here, so
``guard.PolicyGuard`` checks in the workers that the registration took effect.
"""

BACKEND_PATH = "cache_policies.vllm_plugin.backend.RingStoreBackend"
GPU_BACKEND_PATH = "cache_policies.vllm_plugin.cuda.GpuBackend"
FULL_ATTENTION = "full_attention"  # a key of vLLM's AttentionConfig.backend_per_kind
BLOCK_SIZE = 128  # tokens of a page where nobody chose: vLLM's on a CPU, a kernel's tile on a GPU


def register() -> None:
    """Put our attention backend in the place of vLLM's CPU backend; give it a name on a GPU.

    The CPU platform will choose no other. Without a policy the backend hands every layer to
    the stock implementation. Can go when vLLM lets a plugin choose a backend per layer, as its
    GPU platforms do: there ``cuda.choose_backend`` names it.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    import linear_models.register

    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND_PATH)
        linear_models.register.register()
    elif current_platform.is_cuda_alike():
        register_backend(AttentionBackendEnum.CUSTOM, GPU_BACKEND_PATH)
