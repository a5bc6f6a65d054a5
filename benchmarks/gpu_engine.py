"""A vLLM engine on a GPU under cache policies, beside stock vLLM: ``make gpu-engine``.

Raw pages must answer as stock vLLM does, as far as two kernels can in bfloat16; passkeys are asked
for; throughput stands beside stock vLLM with its 16-bit and its fp8 cache. Each engine has a
process and a log of its own. Never run on a GPU so far.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.gpu_machine import Row, require_gpu, save

ROOT = Path(__file__).parents[1]
ENGINES: dict[str, dict[str, str]] = {
    "stock": {}, "stock fp8": {"kv_cache_dtype": "fp8"}, "raw": {"policy": "raw"},
    "int8": {"policy": "int8"}, "kivi-4bit": {"policy": "kivi-4bit"},
    "kivi-2bit": {"policy": "kivi-2bit"},
}  # fmt: skip
JUDGED = ("raw", "int8", "kivi-4bit")  # by the pass keys that stock finds
MISSED = 2  # of 8 pass keys, that they may miss where stock finds them
LIMIT = 900  # seconds for an engine
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key.\n"
HAY = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
ASK = "What is the pass key? The pass key is"
MARK = "RESULT "
MANY, ANSWER, REPEATS = 64, 128, 3
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
    # Blocks of unlike sizes would find unlike parts of a prompt again.
    engine = LLM(model, max_model_len=8192, enable_prefix_caching=False, **options)
    greedy = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, logprobs=5)
    few = passkeys(8, 100)
    found = engine.generate([p for p, _ in few], SamplingParams(temperature=0, max_tokens=8))
    hits = sum(key in out.outputs[0].text for out, (_, key) in zip(found, few, strict=True))
    answers = [o.outputs[0] for o in engine.generate([p[-400:] for p, _ in few], greedy)]
    tokens = [list(answer.token_ids) for answer in answers]
    first = [{str(t): p.logprob for t, p in answer.logprobs[0].items()} for answer in answers]
    facts = {"passkeys": hits, "of": len(few), **_speed(engine)}
    return {"tokens": tokens, "first": first, **facts}


def _speed(engine: Any) -> dict[str, float]:
    """Prompt tokens a second, and answer tokens a second after the prompts: medians."""
    from vllm import SamplingParams

    prompts = [p for p, _ in passkeys(MANY, 60)]

    def took(answer: int) -> tuple[float, int]:
        params = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)
        start = time.perf_counter()
        done = engine.generate(prompts, params)
        return time.perf_counter() - start, sum(len(o.prompt_token_ids) for o in done)

    took(2)  # what is compiled or captured for it
    prefill, whole = (
        sorted(took(answer) for _ in range(REPEATS))[REPEATS // 2] for answer in (1, 1 + ANSWER)
    )
    return {
        "prompt_tokens_per_second": prefill[1] / prefill[0],
        "tokens_per_second": MANY * ANSWER / (whole[0] - prefill[0]),
        "requests_per_second": MANY / whole[0],
    }


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
        note = (
            f"passkeys {r['passkeys']}/{r['of']}, {r['tokens_per_second']:.0f} tokens/s after "
            f"{r['prompt_tokens_per_second']:.0f} prompt tokens/s"
        )
        rows.append(Row(name, _finds(results, name), note, r))
    return rows


def _finds(results: dict[str, dict[str, Any]], name: str) -> bool | None:
    """Whether an engine finds about the pass keys that stock does; None if stock does not."""
    stock = results.get("stock")
    if name not in JUDGED or stock is None or stock["of"] - stock["passkeys"] > MISSED:
        return None
    return bool(results[name]["passkeys"] >= stock["passkeys"] - MISSED)


def run_alone(name: str, model: str, log: Path) -> dict[str, Any] | Row:
    """One engine in a process of its own, all that it says in a file."""
    command = [sys.executable, "-m", "benchmarks.gpu_engine", "--model", model, "--engine", name]
    with log.open("w+") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            return Row(name, False, f"not done after {LIMIT} s; see {log}")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the processes of its engine
            process.wait()
        out.seek(0)
        lines = out.read().splitlines()
    found = [line for line in lines if line.startswith(MARK)]
    if status or not found:
        said = [line for line in lines if "Error" in line] or lines or ["no output"]
        return Row(name, False, f"{said[-1][:300]}; see {log}")
    result: dict[str, Any] = json.loads(found[0].removeprefix(MARK))
    return result


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
        print("\n" + MARK + json.dumps(run_engine(options.model, options.engine)), flush=True)
        return
    results: dict[str, dict[str, Any]] = {}
    failed: list[Row] = []
    status = 0
    for name in ENGINES:
        log = options.out.with_name(f"{options.out.stem}-{name.replace(' ', '-')}.log").absolute()
        found = run_alone(name, options.model, log)
        if isinstance(found, Row):
            failed.append(found)
        else:
            results[name] = found
        # after each of them: what was measured survives whatever comes next
        status = save(rows_of(results) + failed, options.out, model=options.model)
    sys.exit(status)


if __name__ == "__main__":
    main()
