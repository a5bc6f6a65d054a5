"""What sparse prefill saves and what it costs in quality, in the engine, beside stock vLLM.

Usage: ``python -m benchmarks.sparse_prefill [--tokens 8192 --tokens 16384] [--coverage
0.98] [--codec fp16] [--chunk 2048] [--keys 3] [--no-kl] [--json FILE]``

smollm2-135m, stretched by YaRN beyond its 8192 tokens. For every length: seconds to the first
token of stock vLLM and of each codec with and without sparse prefill, seconds of that in attention
(counting and choosing included), the share of the store that was read, passkeys found (seven
digits, at three depths of an essay), and the distance of the next-token distributions from the
codec's own exact prefill on that essay: the mean KL, in nats, of every eighth position from
``exact`` on. One process for each engine, with the same threads and flags.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch

from benchmarks.end_to_end import MARK, result_of, text
from loadtest.quality.metrics import METRICS
from loadtest.workloads.passkey import INSTRUCTION, NEEDLE, QUESTION

TRAINED = 8192  # tokens; YaRN beyond
EVERY = 8  # positions between two distributions that are compared
KEYS = {"7391528": 0.2, "4086127": 0.5, "9512840": 0.8}


def engine(policy: str | None, tokens: int, chunk: int) -> Any:
    """An engine in this process, for prompts of ``tokens`` tokens."""
    from vllm import LLM

    from server.models import get_model

    factor = -(-(tokens + 128) // TRAINED)
    stretched = {
        "max_position_embeddings": factor * TRAINED,
        "rope_parameters": {
            "rope_type": "yarn", "factor": float(factor), "rope_theta": 100000.0,
            "original_max_position_embeddings": TRAINED,
        },
    }  # fmt: skip
    return LLM(
        str(get_model("smollm2-135m")), dtype="float32", enforce_eager=True,
        max_model_len=tokens + 128, max_num_batched_tokens=chunk, block_size=128,
        kv_cache_memory_bytes=3 << 30, enable_prefix_caching=False,
        hf_overrides=stretched if factor > 1 else {},
        additional_config={"cache_policy": policy} if policy else {},
    )  # fmt: skip


def passkey_prompt(tokenizer: Any, tokens: int, key: str, depth: float) -> list[int]:
    """A key hidden in an essay; ``tokens`` tokens with instruction and question."""
    outer = [tokenizer(part).input_ids for part in (INSTRUCTION + "\n", "\n" + QUESTION)]
    needle = tokenizer(" " + NEEDLE.format(key=key)).input_ids
    room = tokens - sum(map(len, outer)) - len(needle)
    hay = tokenizer(text(tokens, 1)).input_ids[:room]
    at = int(depth * len(hay))
    return [*outer[0], *hay[:at], *needle, *hay[at:], *outer[1]]


class Distributions:
    """The next-token distributions of a prompt, gathered as the model makes them."""

    def __init__(self, llm: Any) -> None:
        self.llm, self.seen = llm, list[torch.Tensor]()
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
        model = worker.get_model()
        self._compute = model.compute_logits
        model.compute_logits = self._record

    def _record(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._compute(hidden)
        if logits.shape[0] > 1:  # one row is a sample's
            self.seen.append(logits[::EVERY].float().log_softmax(-1).half())
        return logits

    def of(self, prompt: list[int], extra: dict[str, Any] | None) -> torch.Tensor:
        """``[positions, vocabulary]`` log-probabilities."""
        from vllm import SamplingParams

        self.seen.clear()
        asked = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0, extra_args=extra)
        self.llm.generate([{"prompt_token_ids": prompt}], asked, use_tqdm=False)
        return torch.cat(self.seen)


def measure(
    codec: str | None, tokens: int, chunk: int, methods: list[str], *, keys: int, kl: bool
) -> list[dict[str, Any]]:
    """One engine: a row for each method."""
    from vllm import SamplingParams

    llm = engine(codec, tokens, chunk)
    tokenizer = llm.get_tokenizer()
    essay = tokenizer(text(tokens, 0)).input_ids[:tokens]
    distributions = Distributions(llm) if codec and kl else None
    llm.generate("Warm-up.", SamplingParams(max_tokens=2), use_tqdm=False)
    rows: list[dict[str, Any]] = []
    truth: torch.Tensor | None = None
    for method in methods:
        extra = {"cache_policy": method} if codec else None
        one = SamplingParams(max_tokens=1, temperature=0, extra_args=extra)
        attention = _attention_seconds()
        begin = time.perf_counter()
        (done,) = llm.generate([{"prompt_token_ids": essay}], one, use_tqdm=False)
        row: dict[str, Any] = {"codec": codec, "method": method, "tokens": tokens}
        row["ttft"] = time.perf_counter() - begin
        row["attention"] = _attention_seconds() - attention
        facts = (getattr(done, "kv_transfer_params", None) or {}).get("kv_cache", {})
        row["read_share"] = facts.get("read_share")
        answer = SamplingParams(max_tokens=12, temperature=0, extra_args=extra)
        asked = dict(list(KEYS.items())[:keys])
        prompts = [passkey_prompt(tokenizer, tokens, k, d) for k, d in asked.items()]
        answers = [
            llm.generate([{"prompt_token_ids": p}], answer, use_tqdm=False)[0].outputs[0].text
            for p in prompts
        ]
        right = [METRICS["exact_key"](a, (key,), ()) for a, key in zip(answers, asked, strict=True)]
        row["keys"] = sum(right) / len(right) if right else None
        if distributions is not None:
            found = distributions.of(essay, extra).float()
            truth = found if truth is None else truth
            distance = (truth.exp() * (truth - found)).sum(-1)
            row["kl"] = float(distance[2048 // EVERY :].mean()) if len(distance) > 256 else None
        rows.append(row)
    return rows


def _attention_seconds() -> float:
    """Seconds this process has spent in attention over our pages, as its metric counts them."""
    from prometheus_client import REGISTRY

    from cache_policies.vllm_plugin import backend
    from cache_policies.vllm_plugin.metrics import cache_seconds

    cache_seconds(backend._clock)  # of the last step; otherwise the next one counts it
    value = REGISTRY.get_sample_value("kvthrift_cache_seconds_total", {"part": "attend"})
    return value or 0.0


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, action="append")
    parser.add_argument("--coverage", type=float, action="append")
    parser.add_argument("--codec", action="append")
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--keys", type=int, default=len(KEYS), help="passkeys for each row")
    parser.add_argument("--no-kl", action="store_true", help="leave the distributions out")
    parser.add_argument("--json", help="file for the rows")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sparse = [f"sparse-prefill(coverage={c})" for c in options.coverage or (0.98, 0.95, 0.9)]
    if options.only:
        codec, tokens = options.only[0] or None, int(options.only[1])
        methods = ["all", *sparse] if codec else ["stock"]
        found = measure(
            codec, tokens, options.chunk, methods, keys=options.keys, kl=not options.no_kl
        )
        print(MARK + json.dumps(found))
        return
    print(f"{'':44}{'tokens':>8}{'TTFT s':>9}{'x stock':>9}{'attention s':>12}{'read':>7}"
          f"{'keys':>6}{'KL':>9}")  # fmt: skip
    rows: list[dict[str, Any]] = []
    for tokens in options.tokens or [8192]:
        base = 0.0
        for codec in ("", *(options.codec or ["fp16", "kivi-4bit"])):
            command = [sys.executable, __file__, "--only", codec, str(tokens)]
            command += ["--chunk", str(options.chunk), "--keys", str(options.keys)]
            command += ["--no-kl"] if options.no_kl else []
            command += [f"--coverage={c}" for c in options.coverage or ()]
            for row in result_of(command):
                base = base or row["ttft"]
                rows.append(row)
                _show(row, base)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


def _show(row: dict[str, Any], base: float) -> None:
    def cell(name: str, form: str, width: int) -> str:
        value = row.get(name)
        return f"{'-' if value is None else format(value, form):>{width}}"

    name = f"{row['method']}+{row['codec']}" if row["codec"] else "stock float32"
    print(f"{name:44}{row['tokens']:8}{row['ttft']:9.1f}{row['ttft'] / base:9.2f}"
          f"{cell('attention', '.1f', 12)}{cell('read_share', '.0%', 7)}"
          f"{cell('keys', '.2f', 6)}{cell('kl', '.4f', 9)}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
