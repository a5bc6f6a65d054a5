"""A program of ``tests.engine.programs`` for models with layers of several kinds."""

from __future__ import annotations

from typing import Any


def _poison(llm: Any) -> None:
    """Fill the pool with bytes that are a NaN in every float type, but for vLLM's null block."""
    modules = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    for module in modules.values():
        caches = getattr(module, "kv_cache", ())
        for cache in caches if isinstance(caches, (list, tuple)) else [caches]:
            cache[1:] = float("nan") if cache.is_floating_point() else 255


def family(
    model: str,
    policy: str | None,
    prompts: list[list[int]],
    methods: list[str] = (),  # type: ignore[assignment]
    max_tokens: int = 8,
    **options: Any,
) -> dict[str, Any]:
    """Greedy tokens in a poisoned pool, again with prefix hits, then under methods; the pages."""
    from vllm import SamplingParams

    from tests.engine.programs import _pool, engine

    llm = engine(model, policy, **options)
    _poison(llm)

    def run(prompts: list[list[int]], extra: list[Any]) -> list[Any]:
        parameters = [
            SamplingParams(
                temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False,
                extra_args=e,
            )
            for e in extra
        ]  # fmt: skip
        requests = [{"prompt_token_ids": p} for p in prompts]
        return list(llm.generate(requests, parameters, use_tqdm=False))

    runs = [run(prompts, [None] * len(prompts)) for _ in range(2)]
    longest = [max(prompts, key=len)] * len(methods)
    runs.append(run(longest, [{"cache_policy": m} for m in methods]) if methods else [])
    pool, modules = _pool(llm), llm.llm_engine.vllm_config.compilation_config
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    config = scheduler.kv_cache_config
    layers = [getattr(m, "impl", None) for m in modules.static_forward_context.values()]
    made = [i._layer for i in layers if getattr(i, "_layer", None)]
    tokens = [[list(o.outputs[0].token_ids) for o in outputs] for outputs in runs]
    return {
        "tokens": tokens[0], "again": tokens[1], "methods": tokens[2],
        "cached": [o.num_cached_tokens for o in runs[1]],
        "kept": [(o.kv_transfer_params or {}).get("kv_cache", {}) for o in runs[2]],
        "free": pool.get_num_free_blocks(), "total": pool.num_gpu_blocks - 1,
        "layout": config.kv_cache_layout, "blocks": config.num_blocks,
        "block_bytes": config.kv_cache_tensors[0].size // config.num_blocks,
        "specs": [
            (type(s).__name__, s.block_size, s.state_content_size_bytes, len(g.layer_names))
            for g in config.kv_cache_groups
            for s in [getattr(g.kv_cache_spec, "first_spec", g.kv_cache_spec)]
        ],
        "numbers": [(layer.index, layer.layers) for layer in made],
    }  # fmt: skip
