"""Tokens at once in models with sliding windows, read from vLLM's own block pool.

Usage: ``python -m benchmarks.hybrid_capacity [--model gemma3-270m] [--tokens 32768] [--dtype
bfloat16] [--memory 1024] [--policy kivi-4bit --policy fp16]``

``--model`` is an embedded model, a model folder, or a family of ``tests/engine/tiny_models.py``, of
which a tiny random one is made. Every engine, stock vLLM first, runs in a process of its own and
fills ``--tokens`` tokens with a random prompt and a few tokens of an answer. Printed are blocks of
the pool, bytes of a block, blocks that the request owns once its prompt is complete and the most
it owned on the way; and the tokens that fit at once: the pool over what the request owns, times
its tokens. Which blocks a request owns does not depend on what the model computes, so that its
layers are left out unless ``--compute`` is given.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.end_to_end import ENVIRONMENT, MARK

POLICIES = ("kivi-4bit", "kivi-2bit", "snapkv(budget=1024)+kivi-4bit")
STEPS = 4  # decode steps; pages are given back one step after a cut


def folder_of(model: str, scratch: str) -> str:
    """Where the model is, made if need be."""
    from server.models import MODELS, get_model
    from tests.engine.tiny_models import FAMILIES, make_model

    if model in MODELS:
        return str(get_model(model))
    return make_model(model, Path(scratch)) if model in FAMILIES else model


def _skip_layers(worker: Any) -> None:
    runner = worker.model_runner
    width, dtype = runner.model_config.get_hidden_size(), runner.model_config.dtype

    def forward(*, positions: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.zeros(positions.shape[-1], width, dtype=dtype)

    runner._model_forward = forward


def measure(folder: str, policy: str, options: argparse.Namespace) -> list[int]:
    """Blocks of the pool, bytes of a block, blocks owned at the end and at most."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder,
        dtype=options.dtype,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=options.tokens,
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=options.memory << 20,
        additional_config={"cache_policy": policy} if policy else {},
    )
    core = llm.llm_engine
    if not options.compute:
        core.collective_rpc(_skip_layers)
    manager = core.engine_core.engine_core.scheduler.kv_cache_manager
    config, pool = manager.kv_cache_config, manager.block_pool
    rng = random.Random(0)
    prompt = [rng.randrange(9, 500) for _ in range(options.tokens - STEPS)]
    sampling = SamplingParams(max_tokens=STEPS, ignore_eos=True, detokenize=False)
    core.add_request("only", {"prompt_token_ids": prompt}, sampling)
    owned = []
    while core.has_unfinished_requests():
        core.step()
        owned.append(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
    size = config.kv_cache_tensors[0].size // config.num_blocks
    return [pool.num_gpu_blocks - 1, size, owned[-2], max(owned)]


def main() -> None:
    """Run and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gemma3-270m")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--memory", type=int, default=1024, help="MiB of cache")
    parser.add_argument("--policy", action="append")
    parser.add_argument("--compute", action="store_true", help="run the model's layers too")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only is not None:
        print(MARK + json.dumps(measure(options.model, options.only, options)))
        return
    print("| | blocks | KiB | owned | at most | tokens at once | x stock |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    stock = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        folder = folder_of(options.model, scratch)
        for policy in ("", *(options.policy or POLICIES)):
            command = [sys.executable, "-m", "benchmarks.hybrid_capacity", "--only", policy]
            command += ["--model", folder, "--tokens", str(options.tokens)]
            command += ["--dtype", options.dtype, "--memory", str(options.memory)]
            command += ["--compute"] if options.compute else []
            done = subprocess.run(
                command, check=False, stdout=subprocess.PIPE, text=True,
                env={**os.environ, **ENVIRONMENT},
            )  # fmt: skip
            line = next(x for x in done.stdout.splitlines() if x.startswith(MARK))
            blocks, size, owned, most = json.loads(line.removeprefix(MARK))
            fit = options.tokens * blocks / owned
            stock = stock or fit
            name = policy or f"stock {options.dtype}"
            numbers = f"{blocks} | {size / 1024:.0f} | {owned} | {most} | {fit:,.0f}"
            print(f"| {name} | {numbers} | {fit / stock:.2f} |", flush=True)


if __name__ == "__main__":
    main()
