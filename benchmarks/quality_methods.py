"""Quality of retention and retrieval methods on the embedded model, in one engine.

Usage: ``python benchmarks/quality_methods.py [--codec fp16] [--tokens 1000] [--out FILE]``

For every method at 2x, 4x and 8x (kept tokens against the prompt's):

* passkey: 7 and 64 digits at two depths of a prompt of essay sentences; share of prompts whose
  answer holds the key, and mean share of the key found (longest common substring). The first
  answer token is free: it is computed from the whole prompt by methods that cut after it.
* KL: mean divergence of the second answer token's distribution from that under ``all``, over
  prompts that are growing pieces of one text. The first token is the same for all, and the
  second one is the first to be computed from what was kept. The 200 likeliest tokens are
  compared, the rest counted as one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from typing import TYPE_CHECKING, Any

from benchmarks.end_to_end import ENVIRONMENT, text
from loadtest.passkey import cases
from loadtest.scoring import exact_key, partial_key

if TYPE_CHECKING:
    from pathlib import Path

RATIOS = (2, 4, 8)
DEPTHS = (0.25, 0.65)
LIKELIEST = 200


def methods(ratio: int, tokens: int) -> dict[str, str]:
    """Name -> method that keeps, or reads, 1/ratio of ``tokens`` tokens."""
    share, kept = f"ratio={1 / ratio}", tokens // ratio
    pages = max(1, (kept - 256) // 128)  # one page of sinks, one of window
    ratios = (
        "random", "streaming-llm", "h2o", "snapkv", "pyramidkv", "tova", "keydiff", "knorm",
        "expected-attention", "lagkv",
    )  # fmt: skip
    return {
        **{name: f"{name}({share})" for name in ratios},
        "streaming-llm, cache": f"streaming-llm({share},positions=cache)",
        "h2o, bounded": f"h2o({share},prefill=bounded)",
        "keydiff, full": f"keydiff({share},prefill=full)",
        "infllm": f"infllm(topk={pages},init=128,local=128)",
        "quest": f"quest(topk={pages},init=128,local=128)",
    }


class Runner:
    """One engine, many methods."""

    def __init__(self, codec: str) -> None:
        from vllm import LLM

        from server.models import get_model

        self.llm = LLM(
            str(get_model("smollm2-135m")), dtype="float32", enforce_eager=True,
            max_model_len=4096, max_num_batched_tokens=512, kv_cache_memory_bytes=2 << 30,
            block_size=128, max_logprobs=LIKELIEST, additional_config={"cache_policy": codec},
        )  # fmt: skip

    def generate(self, prompts: list[Any], method: str, **sampling: Any) -> list[Any]:
        """Greedy answers."""
        from vllm import SamplingParams

        chosen = SamplingParams(temperature=0, extra_args={"cache_policy": method}, **sampling)
        return [out.outputs[0] for out in self.llm.generate(prompts, chosen, use_tqdm=False)]

    def passkey(self, method: str, tokens: int) -> dict[str, float]:
        """Exact and partial score by digits."""
        scores: dict[str, float] = {}
        for digits in (7, 64):
            grid = [(tokens, depth) for depth in DEPTHS]
            made = list(cases(self._count, grid=grid, digits=(digits,), texts=("essay",)))
            answers = self.generate([c.prompt for c in made], method, max_tokens=digits + 8)
            pairs = [(a.text, c.key) for a, c in zip(answers, made, strict=True)]
            scores[f"exact {digits}"] = statistics.mean(exact_key(a, k) for a, k in pairs)
            scores[f"partial {digits}"] = statistics.mean(partial_key(a, k) for a, k in pairs)
        return scores

    def _count(self, texts: list[str]) -> list[int]:
        tokenizer = self.llm.get_tokenizer()
        return [len(tokenizer.encode(text)) for text in texts]

    def second_tokens(self, method: str, tokens: int) -> list[dict[int, float]]:
        """Log probabilities of the second answer token over pieces of one text."""
        ids = self.llm.get_tokenizer().encode(text(2 * tokens, seed=3))
        ends = range(tokens - 300, tokens + 300, 100)
        prompts = [{"prompt_token_ids": ids[:end]} for end in ends]
        answers = self.generate(prompts, method, max_tokens=2, ignore_eos=True, logprobs=LIKELIEST)
        return [{t: p.logprob for t, p in a.logprobs[1].items()} for a in answers]


def divergence(base: dict[int, float], other: dict[int, float]) -> float:
    """KL(base, other) in nats over the likeliest tokens of base and one rest."""
    floor = min(other.values())
    pairs = [(math.exp(p), other.get(t, floor)) for t, p in base.items()]
    rest = max(1e-9, 1 - sum(p for p, _ in pairs))
    other_rest = max(1e-9, 1 - sum(math.exp(q) for _, q in pairs))
    total = sum(p * (math.log(p) - q) for p, q in pairs if p > 0)
    return total + rest * math.log(rest / other_rest)


def main() -> None:
    """Run and print the table, one line a method as it is done."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--codec", default="fp16")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--ratio", type=int, action="append")
    parser.add_argument("--out")
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    runner, rows = Runner(options.codec), []
    base = runner.second_tokens("all", options.tokens)
    columns = ("exact 7", "partial 7", "exact 64", "partial 64", "KL")
    print(f"{'':6}{'':24}" + "".join(f"{c:>12}" for c in columns))
    chosen = [("1x", "all", "all")]
    for ratio in options.ratio or RATIOS:
        chosen += [(f"{ratio}x", n, m) for n, m in methods(ratio, options.tokens).items()]
    for ratio_name, name, method in chosen:
        scores = runner.passkey(method, options.tokens)
        seconds = runner.second_tokens(method, options.tokens)
        pairs = zip(base, seconds, strict=True)
        scores["KL"] = statistics.mean(divergence(a, b) for a, b in pairs)
        rows.append({"ratio": ratio_name, "name": name, "method": method, **scores})
        shown = "".join(f"{scores[c]:12.3f}" for c in columns)
        print(f"{ratio_name:6}{name:24}{shown}", flush=True)
        if options.out:
            _save(options.out, rows)


def _save(path: str | Path, rows: list[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
