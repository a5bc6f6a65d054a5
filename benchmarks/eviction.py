"""What eviction gives back and what scoring costs, in the engine itself.

Usage: ``python -m benchmarks.eviction prefill | pool [--tokens N]``

``prefill`` (smollm2-135m): seconds from a prompt of about 7000 tokens to its first token under
each method, in one engine, the most pages in use meanwhile, read from the pool after every step,
and the median of the decode steps that follow. ``pool`` (a random model of one layer, since only
pages matter): requests of 8192 tokens that decode at the same time in a pool of 512 fp16 pages of
128 tokens, and the pages of one request before and after its first decode step.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from benchmarks.end_to_end import ENVIRONMENT, MARK, text

if TYPE_CHECKING:
    from collections.abc import Callable

PREFILL = (
    "all", "snapkv(budget=1024)", "h2o(heavy=512,recent=512)",
    "h2o(heavy=512,recent=512,prefill=bounded)", "streaming-llm(sinks=4,window=1020)",
    "keydiff(budget=1024)", "expected-attention(budget=1024)", "infllm(topk=6,init=128,local=128)",
    "quest(topk=6,init=128,local=128)",
)  # fmt: skip
POOL = (
    "fp16", "kivi-4bit", "snapkv(budget=1024)+fp16", "snapkv(budget=1024)+kivi-4bit",
    "streaming-llm(sinks=4,window=1020)+kivi-4bit",
)  # fmt: skip
DECODE_STEPS = 40
POOL_BYTES = 512 * 128 * 2 * 64 * 2  # pages, tokens, key and value, head size, float16


def in_use(llm: Any) -> int:
    """Pages that are not free."""
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    return int(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())


def engine(model: str, policy: str, **options: Any) -> Any:
    """An engine in this process."""
    from vllm import LLM

    defaults: dict[str, Any] = {
        "dtype": "float32", "enforce_eager": True, "max_model_len": 8448, "block_size": 128,
        "max_num_batched_tokens": 512, "additional_config": {"cache_policy": policy},
    }  # fmt: skip
    return LLM(model, **{**defaults, **options})


def prefill(tokens: int) -> list[tuple[str, float, int, float]]:
    """Method, seconds to the first token, most pages in use, seconds of a decode step."""
    from vllm import SamplingParams

    from server.models import get_model

    llm = engine(
        str(get_model("smollm2-135m")), "fp16", kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False, max_model_len=8192,
    )  # fmt: skip
    prompt = llm.get_tokenizer().encode(text(tokens, seed=0))[:tokens]
    core, rows = llm.llm_engine, []
    for method in PREFILL:
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
        rows.append((method, first, most, statistics.median(others)))
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


def tiny(folder: str) -> None:
    """A random Llama of one layer with one head of 64."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=64, max_position_embeddings=8448,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def in_process(call: str, *arguments: Any) -> Any:
    """The result of a function of this module in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.eviction", "call", json.dumps([call, *arguments])],
        check=True, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT},
    )  # fmt: skip
    line = next(x for x in done.stdout.splitlines() if x.startswith(MARK))
    return json.loads(line.removeprefix(MARK))


def show_prefill(tokens: int) -> None:
    """Print the table of ``prefill``."""
    rows = in_process("prefill", tokens)
    print(f"prompt of {tokens} tokens, chunks of 512, fp16 pages of 128 tokens")
    print(f"{'':44}{'TTFT s':>8}{'x all':>8}{'most pages':>12}{'step ms':>9}{'x all':>8}")
    for method, seconds, most, step in rows:
        ratios = f"{seconds / rows[0][1]:8.2f}", f"{step / rows[0][3]:8.2f}"
        print(f"{method:44}{seconds:8.1f}{ratios[0]}{most:12}{step * 1000:9.1f}{ratios[1]}")


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
    parser.add_argument("table", choices=("prefill", "pool", "call"))
    parser.add_argument("arguments", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, default=7000, help="prompt of `prefill`")
    parser.add_argument("--requests", type=int, default=160, help="requests of `pool`")
    options = parser.parse_args()
    calls: dict[str, Callable[..., Any]] = {"prefill": prefill, "pool": pool}
    if options.table == "call":
        name, *arguments = json.loads(options.arguments)
        print(MARK + json.dumps(calls[name](*arguments)))
    elif options.table == "prefill":
        show_prefill(options.tokens)
    else:
        show_pool(options.requests)


if __name__ == "__main__":
    main()
