"""The whole engine decoding at long context: stock vLLM and policies, one after the other.

Usage: ``python -m benchmarks.end_to_end [--policy kivi-4bit --policy fp16] [--streams 8]
[--steps 24] [--shared 0] [--dtype bfloat16] [--compile]``

Every engine runs in a process of its own with the same threads and flags, without a server
(whose processes would share the cores), eager unless told to compile (which takes minutes and
leaves attention alone). Prompts of about 6000 tokens have nothing in common, or ``shared`` of their
words at the start: prefill is then shorter, and what streams have in common is read from memory
once. Prints seconds to the first token of a lone prompt, and output tokens/s while all streams
decode.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from typing import Any

from loadtest.workloads.haystack import ESSAY

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": str(os.cpu_count()),
}
MARK = "result: "
WORDS = 5300  # of a prompt


def result_of(command: list[str]) -> Any:
    """What a program printed as JSON behind ``MARK``, in a process of its own."""
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT}
    )
    line = next(x for x in done.stdout.splitlines() if x.startswith(MARK))
    return json.loads(line.removeprefix(MARK))


def text(words: int, seed: int) -> str:
    """Essay sentences in random order, about ``words`` words."""
    rng = random.Random(seed)
    parts: list[str] = []
    while sum(len(p.split()) for p in parts) < words:
        parts.append(rng.choice(ESSAY))
    return " ".join(parts)


def measure(
    policy: str | None, streams: int, steps: int, *, shared: float, dtype: str, eager: bool
) -> tuple[float, int, float]:
    """Seconds to the first token of a lone prompt, its tokens, and output tokens/s."""
    from vllm import LLM, SamplingParams

    from server.models import get_model

    llm = LLM(
        str(get_model("smollm2-135m")),
        dtype=dtype,
        enforce_eager=eager,
        max_model_len=8192,
        max_num_batched_tokens=512,
        kv_cache_memory_bytes=3 << 30,
        additional_config={"cache_policy": policy} if policy else {},
    )
    common = text(int(WORDS * shared), seed=0)
    prompts = [f"{common} {text(int(WORDS * (1 - shared)), i + 1)}" for i in range(streams)]
    llm.generate("Warm-up.", SamplingParams(max_tokens=2), use_tqdm=False)
    begin = time.perf_counter()
    lone = llm.generate(prompts[0], SamplingParams(max_tokens=1), use_tqdm=False)[0]
    ttft = time.perf_counter() - begin
    engine = llm.llm_engine
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, SamplingParams(max_tokens=2000, ignore_eos=True))
    while len(engine.step()) < streams:  # until a step gives every stream a token
        pass
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        assert len(engine.step()) == streams
        times.append(time.perf_counter() - begin)
    return ttft, len(lone.prompt_token_ids), streams / statistics.median(times)


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--policy", action="append")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--shared", type=float, default=0.0, help="share of a prompt, 0 to 1")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only is not None:
        found = measure(
            options.only or None, options.streams, options.steps,
            shared=options.shared, dtype=options.dtype, eager=not options.compile,
        )  # fmt: skip
        print(MARK + json.dumps(found))
        return
    print(f"{'':32}{'prompt':>8}{'TTFT s':>9}{'x stock':>9}{'out tok/s':>11}{'x stock':>9}")
    base: tuple[float, float] | None = None
    for policy in ("", *(options.policy or ["kivi-4bit", "kivi-2bit", "fp16"])):
        command = [sys.executable, __file__, "--only", policy, "--streams", str(options.streams)]
        command += ["--steps", str(options.steps), "--shared", str(options.shared)]
        command += ["--dtype", options.dtype]
        command += ["--compile"] if options.compile else []
        ttft, prompt, speed = result_of(command)
        base = base or (ttft, speed)
        name = policy or f"stock {options.dtype}"
        ratios = f"{ttft / base[0]:9.2f}", f"{speed / base[1]:9.2f}"
        print(f"{name:32}{prompt:8}{ttft:9.1f}{ratios[0]}{speed:11.1f}{ratios[1]}", flush=True)


if __name__ == "__main__":
    main()
