"""A vLLM engine on a GPU under cache policies, beside stock vLLM: ``make gpu-engine``.

Raw pages must answer as stock vLLM does, as far as two kernels can in bfloat16; passkeys are asked
for; throughput stands beside stock vLLM with its 16-bit and its fp8 cache. Each engine has a
process of its own. Never run on a GPU so far.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_machine import Row, require_gpu, save

ROOT = Path(__file__).parents[1]
ENGINES: dict[str, dict[str, str]] = {
    "stock": {}, "stock fp8": {"kv_cache_dtype": "fp8"}, "raw": {"policy": "raw"},
    "int8": {"policy": "int8"}, "kivi-4bit": {"policy": "kivi-4bit"},
    "kivi-2bit": {"policy": "kivi-2bit"},
}  # fmt: skip
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key.\n"
HAY = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
ASK = "What is the pass key? The pass key is"
MARK = "RESULT "
# Two kernels add in other orders, so answers part where two tokens are about as likely; from there
# on they are other texts. A first token's logit is rounded to 8 bits: by up to 0.06 between 16 and
# 32, and so is each of the sums before it.
NEAR = 0.25  # nats between the log-probabilities of stock's first token
SHARE = 0.5  # of stock's tokens, before the answers part
# Looking for a GPU must not spoil the processes that an engine starts.
ENVIRONMENT = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


def passkeys(count: int, lines: int) -> list[tuple[str, str]]:
    """Prompts and the keys hidden in them; always the same ones."""
    rng, made = random.Random(0), []
    for _ in range(count):
        key = str(rng.randint(10000, 99999))
        at = rng.randrange(lines)
        made.append((HAY * at + NEEDLE.format(key=key) + HAY * (lines - at) + ASK, key))
    return made


def run_engine(model: str, name: str) -> dict[str, Any]:
    """Tokens, first log-probabilities, passkeys found and tokens a second of one engine."""
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = dict(ENGINES[name])
    policy = options.pop("policy", None)
    if policy:
        from cache_policies.vllm_plugin.cuda import BLOCK_SIZE, FULL_ATTENTION

        options["additional_config"] = {"cache_policy": policy, "cache_kernel": "triton"}
        options["attention_config"] = {"backend_per_kind": {FULL_ATTENTION: "CUSTOM"}}
        options["block_size"] = BLOCK_SIZE
        options["compilation_config"] = {"cudagraph_mode": "PIECEWISE"}
    engine = LLM(model, max_model_len=8192, **options)
    greedy = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, logprobs=5)
    few = passkeys(8, 100)
    found = engine.generate([p for p, _ in few], SamplingParams(temperature=0, max_tokens=8))
    hits = sum(key in out.outputs[0].text for out, (_, key) in zip(found, few, strict=True))
    answers = [o.outputs[0] for o in engine.generate([p[-400:] for p, _ in few], greedy)]
    tokens = [list(answer.token_ids) for answer in answers]
    first = [{str(t): p.logprob for t, p in answer.logprobs[0].items()} for answer in answers]
    many = [p for p, _ in passkeys(64, 60)]
    start = time.perf_counter()
    done = engine.generate(many, SamplingParams(temperature=0, max_tokens=128, ignore_eos=True))
    took = time.perf_counter() - start
    made = sum(len(o.outputs[0].token_ids) for o in done)
    facts = {"passkeys": hits, "of": len(few), "tokens_per_second": made / took}
    return {"tokens": tokens, "first": first, **facts}


def agreement(stock: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """How far one engine's answers are those of another.

    Returns:
        The share of stock's tokens before the answers part, and the largest difference of the
        log-probabilities of stock's first tokens; infinite where one is not among the other's most
        likely ones.

    """
    same = made = 0
    apart = 0.0
    for i, (expected, got) in enumerate(zip(stock["tokens"], other["tokens"], strict=True)):
        pairs = zip(expected, got, strict=True)
        same += next((n for n, (a, b) in enumerate(pairs) if a != b), len(expected))
        made += len(expected)
        token = str(expected[0])
        there = other["first"][i].get(token, -math.inf)
        apart = max(apart, abs(stock["first"][i][token] - there))
    return same / made, apart


def rows_of(results: dict[str, dict[str, Any]]) -> list[Row]:
    """The table: raw against stock, then each engine."""
    rows = []
    if {"raw", "stock"} <= results.keys():
        share, apart = agreement(results["stock"], results["raw"])
        note = (
            f"{share:.0%} of stock's greedy tokens before answers part (at least {SHARE:.0%}), "
            f"first tokens' log-probabilities at most {apart:.3f} apart (at most {NEAR})"
        )
        rows.append(Row("raw pages answer as stock", share >= SHARE and apart <= NEAR, note))
    for name, r in results.items():
        note = f"passkeys {r['passkeys']}/{r['of']}, {r['tokens_per_second']:.0f} tokens/s"
        rows.append(Row(name, None, note, r))
    return rows


def main() -> None:
    """Run all engines, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="Qwen/Qwen2.5-1.5B-Instruct")
    parser.add_argument("--out", type=Path, default=Path("gpu-engine.json"))
    parser.add_argument("--engine", choices=ENGINES, help="one engine, in this process")
    options = parser.parse_args()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    require_gpu("gpu-engine")
    if options.engine:
        print(MARK + json.dumps(run_engine(options.model, options.engine)))
        return
    results, failed = {}, []
    for name in ENGINES:
        command = [sys.executable, "-m", "benchmarks.gpu_engine", "--model", options.model]
        done = subprocess.run([*command, "--engine", name], cwd=ROOT, capture_output=True,
                              text=True, check=False)  # fmt: skip
        lines = [x for x in done.stdout.splitlines() if x.startswith(MARK)]
        if done.returncode or not lines:
            error = (done.stderr.strip().splitlines() or ["no output"])[-1]
            failed.append(Row(name, False, error, {"stderr": done.stderr[-4000:]}))
            continue
        results[name] = json.loads(lines[0].removeprefix(MARK))
    sys.exit(0 if save(rows_of(results) + failed, options.out, model=options.model) else 1)


if __name__ == "__main__":
    main()
