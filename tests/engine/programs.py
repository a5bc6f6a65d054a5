"""What the engine tests run: ``python -m tests.engine.programs``.

The process reads a program's name and arguments as a line of JSON, runs it, and prints what it
returned on a line that begins with MARK; then the next, after all of the engine is gone.
"""

from __future__ import annotations

import gc
import json
import random
import sys
import traceback
from typing import Any

from tests.engine.hybrids import family  # noqa: F401  # a program too
from tests.engine.rotary import biased, rotary  # noqa: F401  # programs too

MARK = "program result: "


def engine(model: str, policy: str | None, **options: Any) -> Any:
    from vllm import LLM

    defaults: dict[str, Any] = {
        "dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "seed": 0,
        "kv_cache_memory_bytes": 64 << 20, "max_num_batched_tokens": 256,
        "disable_log_stats": False,
    }  # fmt: skip
    if policy is not None:
        defaults["additional_config"] = {"cache_policy": policy}
    return LLM(model, **{**defaults, **options})


def _core(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core


def _pool(llm: Any) -> Any:
    return _core(llm).scheduler.kv_cache_manager.block_pool


def _preemptions(llm: Any) -> int:
    return next(int(m.value) for m in llm.get_metrics() if m.name == "vllm:num_preemptions")


def _generate(
    llm: Any, prompts: list[list[int]], max_tokens: int, salt: str | None = None, **sampling: Any
) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    parameters = SamplingParams(
        temperature=sampling.pop("temperature", 0), max_tokens=max_tokens, logprobs=1,
        ignore_eos=True, **sampling,
    )  # fmt: skip
    requests = [{"prompt_token_ids": p, **({"cache_salt": salt} if salt else {})} for p in prompts]
    return [
        {
            "tokens": [list(c.token_ids) for c in out.outputs],
            "logprobs": [
                [step[t].logprob for step, t in zip(c.logprobs, c.token_ids, strict=True)]
                for c in out.outputs
            ],
            "cached": out.num_cached_tokens,
        }
        for out in llm.generate(requests, parameters, use_tqdm=False)
    ]


def generate(
    model: str, policy: str | None, prompts: list[list[int]], max_tokens: int = 24, **options: Any
) -> dict[str, Any]:
    """Greedy tokens and logprobs of a batch, and the pool afterwards."""
    sampling = options.pop("sampling", {})
    llm = engine(model, policy, **options)
    results = _generate(llm, prompts, max_tokens, **sampling)
    pool = _pool(llm)
    layer = next(
        iter(llm.llm_engine.vllm_config.compilation_config.static_forward_context.values())
    )
    return {
        "results": results,
        "free": pool.get_num_free_blocks(),
        "total": pool.num_gpu_blocks - 1,  # vLLM keeps one null block
        "preemptions": _preemptions(llm),
        "impl": type(getattr(layer, "impl", layer)).__name__,
        "runner": type(_core(llm).model_executor.driver_worker.worker.model_runner).__module__,
        "scheduler": type(_core(llm).scheduler).__name__,
    }


def twice(
    model: str, policy: str, prompts: list[list[int]], max_tokens: int = 24, **options: Any
) -> list[Any]:
    """The same prompts fresh, again (hitting the prefix cache), and fresh under a salt."""
    llm = engine(model, policy, **options)
    return [_generate(llm, prompts, max_tokens, salt) for salt in (None, None, "other")]


def alone(
    model: str, policy: str, prompts: list[list[int]], max_tokens: int = 24, **options: Any
) -> list[Any]:
    """One request after the other, prefix caching off."""
    llm = engine(model, policy, enable_prefix_caching=False, **options)
    return [_generate(llm, [prompt], max_tokens)[0] for prompt in prompts]


def storm(
    model: str,
    policy: str,
    requests: int,
    seed: int,
    methods: tuple[str | None, ...] = ("all",),
    longest: int = 500,
    **options: Any,
) -> dict[str, int]:
    """Random requests with random cancellations in a tiny pool; then every page must be free."""
    from vllm import SamplingParams

    llm = engine(model, policy, **options)
    rng, core = random.Random(seed), llm.llm_engine
    pool = _pool(llm)
    before, waiting, alive, finished, cancelled, owned_twice = (
        pool.get_num_free_blocks(),
        requests,
        {},
        0,
        0,
        0,
    )
    manager = core.engine_core.engine_core.scheduler.kv_cache_manager.coordinator
    while waiting or alive:
        if waiting and len(alive) < 12:
            name = f"r{waiting}"
            prompt = [7] * rng.choice((3, 3, 200)) + [
                rng.randrange(9, 200) for _ in range(rng.randrange(1, longest))
            ]
            parameters = SamplingParams(
                temperature=0,
                max_tokens=rng.randrange(1, 40),
                ignore_eos=True,
                extra_args={"cache_policy": m} if (m := rng.choice(methods)) else None,
            )
            core.add_request(name, {"prompt_token_ids": prompt}, parameters)
            alive[name], waiting = True, waiting - 1
        for output in core.step():
            if output.finished:
                finished += alive.pop(output.request_id, False)
        for name in [n for n in alive if rng.random() < 0.02]:
            core.abort_request([name])
            del alive[name]
            cancelled += 1
        rings = [
            block.block_id
            for m in manager.single_type_managers
            for row in m.req_to_blocks.values()
            for block in row
            if block.block_hash is None and not block.is_null  # unpublished: of one request
        ]
        owned_twice += len(rings) - len(set(rings))
    core.step()
    leaked = before - pool.get_num_free_blocks()
    core.add_request("last", {"prompt_token_ids": [7]}, SamplingParams(max_tokens=1))
    while core.has_unfinished_requests():  # in its step the worker learns of those that ended
        core.step()
    return {
        "finished": finished, "cancelled": cancelled, "owned_twice": owned_twice,
        "leaked": leaked, "preemptions": _preemptions(llm), "known": _known_requests(),
    }  # fmt: skip


def _known_requests() -> int:
    """How many requests the newest engine's worker remembers."""
    from cache_policies.vllm_plugin.rows import _ROWS

    return len(list(_ROWS.values())[-1].row) if _ROWS else 0


def _answered_when_preempted(scheduler: Any) -> dict[str, int]:
    """Filled as requests are preempted for the first time: tokens of their answers."""
    preempt, answered = scheduler._preempt_request, {}

    def noted(request: Any, *rest: Any, **more: Any) -> None:
        tokens = request.num_output_tokens + request.num_output_placeholders
        name = request.request_id.rpartition("-")[0]  # vLLM adds a random part
        answered.setdefault(name, tokens)
        preempt(request, *rest, **more)

    scheduler._preempt_request = noted
    return answered


def mixed(
    model: str,
    policy: str,
    prompts: list[list[int]],
    methods: list[str | None],
    max_tokens: int = 24,
    together: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Each prompt under a method of its own, in one batch or one after the other."""
    from vllm import SamplingParams

    llm = engine(model, policy, **options)
    pool = _pool(llm)
    parameters = [
        SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True,
            extra_args={"cache_policy": method} if method else None,
        )
        for method in methods
    ]  # fmt: skip
    answered = _answered_when_preempted(_core(llm).scheduler)
    pairs = list(zip(prompts, parameters, strict=True))
    batches = [pairs] if together else [[pair] for pair in pairs]
    outputs = [
        out
        for batch in batches
        for out in llm.generate(
            [{"prompt_token_ids": p} for p, _ in batch], [s for _, s in batch], use_tqdm=False
        )
    ]
    return {
        "tokens": [list(o.outputs[0].token_ids) for o in outputs],
        "cached": [o.num_cached_tokens for o in outputs],
        "facts": [(o.kv_transfer_params or {}).get("kv_cache") for o in outputs],
        "undisturbed": [answered.get(o.request_id, max_tokens) for o in outputs],
        "free": pool.get_num_free_blocks(), "total": pool.num_gpu_blocks - 1,
        "preemptions": _preemptions(llm),
    }  # fmt: skip


def embedded(
    model: str, policy: str, prompts: list[list[int]], methods: list[str], **options: Any
) -> list[list[int]]:
    """Each prompt under its method, given as the embeddings of its tokens."""
    from pathlib import Path

    import torch
    from safetensors.torch import load_file
    from vllm import SamplingParams

    llm = engine(model, policy, enable_prompt_embeds=True, **options)
    table = load_file(Path(model) / "model.safetensors")["model.embed_tokens.weight"]
    outputs = llm.generate(
        [{"prompt_embeds": table[torch.tensor(prompt)]} for prompt in prompts],
        [
            SamplingParams(
                temperature=0, max_tokens=24, ignore_eos=True, extra_args={"cache_policy": method}
            )
            for method in methods
        ],
        use_tqdm=False,
    )
    return [list(out.outputs[0].token_ids) for out in outputs]


def pool_by_step(
    model: str,
    policy: str,
    prompt: list[int],
    methods: list[str],
    max_tokens: int = 4,
    **options: Any,
) -> list[list[tuple[int, ...]]]:
    """Per method: tokens computed and pages in use after every step of one request."""
    from vllm import SamplingParams

    llm = engine(model, policy, **options)
    core, pool = llm.llm_engine, _pool(llm)
    scheduler = core.engine_core.engine_core.scheduler
    results = []
    for method in methods:
        parameters = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True,
            extra_args={"cache_policy": method},
        )  # fmt: skip
        core.add_request(method, {"prompt_token_ids": prompt}, parameters)
        seen = []
        while core.has_unfinished_requests():
            core.step()
            computed = [request.num_computed_tokens for request in scheduler.requests.values()]
            seen.append((*computed, pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()))
        results.append(seen)
    return results


def rejected(model: str, policy: str | None, methods: list[Any], **options: Any) -> list[str]:
    """How requests with bad policies end, and whether a good one after them is served."""
    from vllm import SamplingParams

    llm = engine(model, policy, **options)
    results = []
    for extra in (*({"cache_policy": method} for method in methods), None):
        parameters = SamplingParams(temperature=0, max_tokens=2, extra_args=extra)
        try:
            outputs = llm.generate([{"prompt_token_ids": [5, 6, 7]}], parameters, use_tqdm=False)
            results.append(str(outputs[0].outputs[0].finish_reason))
        except Exception as error:
            results.append(f"{type(error).__name__}: {error}")
    return results


def refused(model: str, policy: str | None, **options: Any) -> str:
    """The message with which an engine refuses to start; empty if it starts."""
    try:
        engine(model, policy, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refused_each(cases: list[tuple[str, str | None, dict[str, Any]]]) -> list[str]:
    """Messages of engines that must not start; none may get as far as its first step.

    Args:
        cases: model, policy and options of each.

    """
    return [refused(model, policy, **options) for model, policy, options in cases]


def _answer(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        return {"result": globals()[name](**arguments)}
    except Exception:
        return {"error": traceback.format_exc()}
    finally:
        gc.collect()
        cleanup_dist_env_and_memory()


def main() -> None:
    for line in sys.stdin:
        print(f"\n{MARK}{json.dumps(_answer(*json.loads(line)))}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
