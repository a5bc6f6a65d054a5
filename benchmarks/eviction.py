"""What eviction gives back and what scoring costs, in the engine itself.

Usage: ``python -m benchmarks.eviction prefill | pool | heads [--tokens N] [--method M ...]``

``prefill`` (smollm2-135m): seconds from a prompt of about 7000 tokens to its first token under
each method, in one engine, the most pages in use meanwhile, read from the pool after every step,
and the median and the longest of the decode steps that follow (of methods that cut answers: the
one with the cut). ``pool`` (a random model of one layer, since only pages matter): requests of
8192 tokens that decode at the same time in a pool of 512 fp16 pages of 128 tokens, and the pages
of one request before and after its first decode step. ``heads`` (no model: layers of 32 query and
8 KV heads of 64, random tokens): decode steps of four requests that keep 1024 of 2048 tokens,
with uniform and with adaptive heads in turn.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from benchmarks.end_to_end import MARK, result_of, text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PREFILL = (
    "snapkv(budget=1024)", "h2o(heavy=512,recent=512)",
    "h2o(heavy=512,recent=512,prefill=bounded)", "streaming-llm(sinks=4,window=1020)",
    "keydiff(budget=1024)", "expected-attention(budget=1024)", "infllm(topk=6,init=128,local=128)",
    "quest(topk=6,init=128,local=128)", "snapkv(budget=1024,heads=adaptive)",
    "expected-attention(budget=1024,heads=adaptive)", "h2o(heavy=512,recent=512,heads=adaptive)",
    "snapkv(budget=1024,merge=values)", "keydiff(budget=1024,merge=values)",
    "r-kv(budget=1024)", "r-kv(budget=1024,prefill=bounded)", "compactor(budget=1024)",
    "snapkv(budget=2048)+quest(topk=6,init=128,local=128)",
)  # fmt: skip
POOL = (
    "fp16", "kivi-4bit", "snapkv(budget=1024)+fp16", "snapkv(budget=1024)+kivi-4bit",
    "streaming-llm(sinks=4,window=1020)+kivi-4bit",
)  # fmt: skip
DECODE_STEPS = 136  # methods that cut answers do once among so many
HEADS, KV_HEADS, SIZE = 32, 8, 64  # of `heads`
LAYERS, REQUESTS, STEPS = 16, 4, 100
POOL_BYTES = 512 * 128 * 2 * 64 * 2  # pages, tokens, key and value, head size, float16


def in_use(llm: Any) -> int:
    """Pages that are not free."""
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    return int(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())


def engine(model: str, policy: str | None, **options: Any) -> Any:
    """An engine in this process."""
    from vllm import LLM

    defaults: dict[str, Any] = {
        "dtype": "float32", "enforce_eager": True, "max_model_len": 8448, "block_size": 128,
        "max_num_batched_tokens": 512,
        "additional_config": {"cache_policy": policy} if policy else {},
    }  # fmt: skip
    return LLM(model, **{**defaults, **options})


def prefill(tokens: int, methods: list[str]) -> list[tuple[str, float, int, float, float]]:
    """Method, seconds to the first token, most pages, seconds of a decode step and the longest."""
    from vllm import SamplingParams

    from server.models import get_model

    llm = engine(
        str(get_model("smollm2-135m")), "fp16", kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False, max_model_len=8192,
    )  # fmt: skip
    prompt = llm.get_tokenizer().encode(text(tokens, seed=0))[:tokens]
    core, rows = llm.llm_engine, []
    for method in methods:
        chosen = SamplingParams(
            max_tokens=DECODE_STEPS, ignore_eos=True, extra_args={"cache_policy": method}
        )
        core.add_request(method, {"prompt_token_ids": prompt}, chosen)
        begin, most, ends = time.perf_counter(), 0, [0.0]
        while core.has_unfinished_requests():
            outputs = core.step()
            most = max(most, in_use(llm))
            if outputs:
                ends.append(time.perf_counter() - begin)
        first, *others = (b - a for a, b in pairwise(ends))
        rows.append((method, first, most, statistics.median(others), max(others[1:])))
    return rows


def pool(policy: str, folder: str, requests: int) -> tuple[int, int, int]:
    """Most requests decoding at once, pages of one before and after its first decode step."""
    from vllm import SamplingParams

    llm = engine(
        folder, policy, kv_cache_memory_bytes=POOL_BYTES, max_num_batched_tokens=8192,
        max_num_seqs=512, skip_tokenizer_init=True,
    )  # fmt: skip
    core, rng = llm.llm_engine, random.Random(0)
    scheduler = core.engine_core.engine_core.scheduler
    chosen = SamplingParams(max_tokens=250, ignore_eos=True, detokenize=False)

    def add(name: str) -> None:
        prompt = [rng.randrange(256) for _ in range(8192)]
        core.add_request(name, {"prompt_token_ids": prompt}, chosen)

    add("first")
    core.step()
    before = in_use(llm)
    core.step()
    after = in_use(llm)
    for i in range(requests - 1):
        add(str(i))
    most, idle = 1, 0  # idle: steps in which no request could be added
    while idle < 4 and scheduler.get_request_counts()[1]:
        core.step()
        decoding = sum(r.num_computed_tokens > 8192 for r in scheduler.running)
        idle = 0 if decoding > most else idle + 1
        most = max(most, decoding)
    return most, before, after


def tiny(folder: str, longest: int = 8448) -> None:
    """A random Llama of one layer with one head of 64, for so many tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=64,
        max_position_embeddings=longest,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def layer_steps(codec: str, method: str) -> Callable[[], float]:
    """A decode step of layers of random tokens; returns milliseconds of one layer."""
    import numpy as np
    import torch

    from cache_policies.kernels.contract import Shape
    from cache_policies.kernels.cpu import CpuKernel
    from cache_policies.pages.layout import PageLayout
    from cache_policies.pages.plan import Plan
    from cache_policies.policy import parse, parse_method
    from cache_policies.retention.rope import Rope
    from cache_policies.step.cut import Layer, Tokens
    from cache_policies.step.request import Engine, RequestState, span_of
    from cache_policies.step.step import Step

    layout = PageLayout(parse(codec).codec, SIZE, 128, torch.float32)
    plan, prompt, scale = Plan.of(layout), 2048, SIZE**-0.5
    span = span_of(parse_method(method), Engine(plan, LAYERS, 2 * prompt, 10**6), prompt)
    states = [RequestState(parse_method(method), span) for _ in range(REQUESTS)]
    count = REQUESTS * span.pages(prompt + STEPS)
    table = torch.randperm(count).to(torch.int32).reshape(REQUESTS, -1)
    kernel, rope = CpuKernel(layout, Shape(HEADS, KV_HEADS, scale)), Rope(torch.empty(0), 0)
    layers = [
        Layer(i, LAYERS, layout, kernel, pages, rope, scale)
        for i, pages in enumerate(torch.zeros(LAYERS, count, KV_HEADS, layout.head_bytes).byte())
    ]
    spread = torch.linspace(0.3, 2, KV_HEADS)[:, None]  # heads look at many tokens, or at few

    def step(fresh: int = 1) -> float:
        before, tokens = states[0].computed, REQUESTS * fresh
        query, output = torch.randn(tokens, HEADS, SIZE), torch.empty(tokens, HEADS, SIZE)
        key, value = torch.randn(2, tokens, KV_HEADS, SIZE)
        begin = time.perf_counter()
        for state in states:
            state.advance(before, before + fresh)
        start = np.arange(REQUESTS + 1, dtype=np.int32) * fresh
        step = Step(plan, start, np.full(REQUESTS, before, dtype=np.int32), states, table)
        for layer in layers:
            step.run(layer, Tokens(query, key * spread, value), output)
        return (time.perf_counter() - begin) / LAYERS * 1000

    step(prompt)
    return step


def show_heads() -> None:
    """Print the table of ``heads``."""
    print(f"{'':12}{'uniform ms':>12}{'adaptive ms':>13}{'x':>7}")
    for codec in ("fp16", "kivi-4bit"):
        names = [f"snapkv(budget=1024,heads={heads})" for heads in ("uniform", "adaptive")]
        steps = [layer_steps(codec, name) for name in names]
        times = [[step() for step in steps] for _ in range(STEPS)]
        uniform, adaptive = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"{codec:12}{uniform:12.2f}{adaptive:13.2f}{adaptive / uniform:7.2f}", flush=True)


def in_process(call: str, *arguments: Any) -> Any:
    """The result of a function of this module in a process of its own."""
    given = json.dumps([call, *arguments])
    return result_of([sys.executable, "-m", "benchmarks.eviction", "call", given])


def show_prefill(tokens: int, methods: Sequence[str]) -> None:
    """Print the table of ``prefill``."""
    rows = in_process("prefill", tokens, ["all", *methods])
    print(f"prompt of {tokens} tokens, chunks of 512, fp16 pages of 128 tokens")
    columns = f"{'TTFT s':>8}{'x all':>8}{'most pages':>12}{'step ms':>9}{'x all':>8}{'longest':>9}"
    print(f"{'':52}{columns}")
    for method, seconds, most, step, longest in rows:
        ratios = f"{seconds / rows[0][1]:8.2f}", f"{step / rows[0][3]:8.2f}"
        print(
            f"{method:52}{seconds:8.1f}{ratios[0]}{most:12}{step * 1000:9.1f}{ratios[1]}"
            f"{longest * 1000:9.1f}"
        )


def show_pool(requests: int) -> None:
    """Print the table of ``pool``."""
    print(f"{'':48}{'at once':>8}{'x fp16':>8}{'before':>8}{'after':>8}{'given back':>12}")
    with tempfile.TemporaryDirectory() as folder:
        tiny(folder)
        base = 0
        for policy in POOL:
            most, before, after = in_process("pool", policy, folder, requests)
            base = base or most
            share = f"{1 - after / before:12.0%}"
            print(f"{policy:48}{most:8}{most / base:8.1f}{before:8}{after:8}{share}", flush=True)


def main() -> None:
    """Run one of the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("table", choices=("prefill", "pool", "heads", "call"))
    parser.add_argument("arguments", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, default=7000, help="prompt of `prefill`")
    parser.add_argument(
        "--method", action="append", help="of `prefill`, after `all`; all by default"
    )
    parser.add_argument("--requests", type=int, default=160, help="requests of `pool`")
    options = parser.parse_args()
    calls: dict[str, Callable[..., Any]] = {"prefill": prefill, "pool": pool}
    if options.table == "call":
        name, *arguments = json.loads(options.arguments)
        print(MARK + json.dumps(calls[name](*arguments)))
    elif options.table == "prefill":
        show_prefill(options.tokens, options.method or PREFILL)
    elif options.table == "heads":
        show_heads()
    else:
        show_pool(options.requests)


if __name__ == "__main__":
    main()
