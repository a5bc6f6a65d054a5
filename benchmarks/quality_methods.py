"""Quality of retention and retrieval methods on the embedded model, in one engine.

Usage: ``python -m benchmarks.quality_methods [--codec fp16] [--tokens 1200] [--workload W ...]
[--ratio R ...] [--method NAME ...] [--out FILE]``

Pages of 32 tokens, so that retrieval can read as little as retention keeps. For every method at
2x, 4x and 8x (kept tokens, or read ones, against the prompt's; of two stages those read):

* mean scores of the tasks of load-test workloads, by default passkeys of 7 and 64 digits at two
  depths, RULER's needle among others, variable chain and most common words, and the next line of
  code. The first answer token is free: it is computed from the whole prompt by methods that cut
  after it.
* same: the mean share of an answer that equals the answer under ``all``, from its start.
* KL: mean divergence from ``all`` of the distributions of the next 32 tokens of a text, given the
  text itself, over pieces of Python's own documentation. The first of them is left out: it is
  computed from the whole prompt by methods that cut after it. The 200 likeliest tokens are
  compared, the rest counted as one.
* agrees: share of these tokens for which the likeliest one is that under ``all``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from itertools import takewhile
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any

from benchmarks.end_to_end import ENVIRONMENT
from loadtest.quality import score
from loadtest.quality.metrics import partial_key
from loadtest.workloads import Item, parse_workload
from loadtest.workloads.tokens import LocalTokenizer
from server.models import get_model

if TYPE_CHECKING:
    from pathlib import Path

RATIOS = (2, 4, 8)
WORKLOADS = (
    "passkey(lengths={tokens},depths=0.2|0.5|0.8,texts=essay)",
    "ruler(lengths={tokens},samples=2,tasks=multikey|vt|cwe)",
    "code(lengths={tokens},samples=2)",
)  # rows of LongBench tell more, where they are at hand
TOPICS = ("execmodel", "import", "formatstrings", "compound", "types", "debugger")
NEXT = 32  # tokens of a text that are predicted from what was kept of it
LIKELIEST = 200
MAX_LEN = 4096
PAGE = 32


def methods(ratio: int, tokens: int) -> dict[str, str]:
    """Name -> method that keeps, or reads, 1/ratio of ``tokens`` tokens."""
    share, kept = f"ratio={1 / ratio}", tokens // ratio
    read = f"topk={max(1, kept // PAGE - 3)},init={PAGE},local={2 * PAGE}"
    ratios = (
        "random", "streaming-llm", "h2o", "snapkv", "pyramidkv", "tova", "keydiff", "knorm",
        "expected-attention", "lagkv", "r-kv", "compactor",
    )  # fmt: skip
    return {
        **{name: f"{name}({share})" for name in ratios},
        **{
            f"{name}, adaptive": f"{name}({share},heads=adaptive)"
            for name in ("h2o", "snapkv", "pyramidkv", "expected-attention")
        },
        **{
            f"{name}, merged": f"{name}({share},merge=values)"
            for name in ("snapkv", "h2o", "knorm", "random")
        },
        "snapkv, kernel 21": f"snapkv({share},kernel=21)",
        "streaming-llm, cache": f"streaming-llm({share},positions=cache)",
        "h2o, bounded": f"h2o({share},prefill=bounded)",
        "keydiff, full": f"keydiff({share},prefill=full)",
        "infllm": f"infllm({read})",
        "quest": f"quest({read})",
        # both stages save alike: each leaves a share of what it gets, the root of 1 / ratio
        "snapkv, then quest": f"snapkv(ratio={ratio**-0.5:.4f},kernel=63)+quest({read})",
    }


class Runner:
    """One engine, many methods."""

    def __init__(self, codec: str) -> None:
        from vllm import LLM

        self.llm = LLM(
            str(get_model("smollm2-135m")), dtype="float32", enforce_eager=True,
            max_model_len=MAX_LEN, max_num_batched_tokens=512, kv_cache_memory_bytes=2 << 30,
            block_size=PAGE, max_logprobs=LIKELIEST, additional_config={"cache_policy": codec},
            logits_processors=[forcing()],
        )  # fmt: skip
        self.answers: dict[str, Any] = {}

    def generate(
        self, prompts: list[Any], method: str, lengths: list[int], **sampling: Any
    ) -> list[Any]:
        """Greedy answers of at most so many tokens each."""
        from vllm import SamplingParams

        extra = {"cache_policy": method}
        chosen = [
            SamplingParams(temperature=0, max_tokens=length, extra_args=extra, **sampling)
            for length in lengths
        ]
        return [out.outputs[0] for out in self.llm.generate(prompts, chosen, use_tqdm=False)]

    def scores(self, method: str, items: list[Item]) -> dict[str, float]:
        """Mean score of every task; the partial score too, of passkeys; and ``same``."""
        scores: dict[str, list[float]] = {}
        prompts = [self._prompt(item) for item in items]
        answers = self.generate(prompts, method, [item.max_tokens for item in items])
        for item, answer in zip(items, answers, strict=True):
            found = score(item, answer.text)
            scores.setdefault(item.task, []).append(0.0 if found is None else found)
            if item.metric == "exact_key":
                partial = partial_key(answer.text, item.references[0])
                scores.setdefault(item.task + " partial", []).append(partial)
            whole = self.answers.setdefault(item.prompt, answer.token_ids)  # of ``all``
            equal = takewhile(
                lambda pair: pair[0] == pair[1], zip(whole, answer.token_ids, strict=False)
            )
            scores.setdefault("same", []).append(sum(1 for _ in equal) / max(1, len(whole)))
        return {task: statistics.mean(values) for task, values in sorted(scores.items())}

    def _prompt(self, item: Item) -> str:
        if not item.chat:
            return item.prompt
        said = [{"role": "user", "content": item.prompt}]
        tokenizer = self.llm.get_tokenizer()
        return str(tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True))

    def next_tokens(self, method: str, tokens: int) -> list[dict[int, float]]:
        """Log probabilities of the tokens that follow the first ``tokens`` of texts."""
        from vllm import SamplingParams

        prompts, chosen = [], []
        for topic in TOPICS:
            text = self.llm.get_tokenizer().encode(topics[topic])
            assert len(text) >= tokens + NEXT, f"{topic} is too short"
            extra = {"cache_policy": method, FORCED: text[tokens : tokens + NEXT]}
            prompts.append({"prompt_token_ids": text[:tokens]})
            chosen.append(SamplingParams(
                temperature=0, max_tokens=NEXT, ignore_eos=True, logprobs=LIKELIEST,
                extra_args=extra,
            ))  # fmt: skip
        answers = [out.outputs[0] for out in self.llm.generate(prompts, chosen, use_tqdm=False)]
        return [
            {token: p.logprob for token, p in step.items()}
            for answer in answers
            for step in answer.logprobs[1:]
        ]


FORCED = "forced_tokens"


def forcing() -> type:
    """A logits processor that makes a request answer with ``extra_args[FORCED]``.

    Log probabilities are taken before it (vLLM's default), so that a text is predicted token by
    token while the engine decodes.
    """
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

    class Forcing(AdapterLogitsProcessor):  # type: ignore[misc]
        def is_argmax_invariant(self) -> bool:
            return False

        def new_req_logits_processor(self, params: Any) -> Any:
            forced = (params.extra_args or {}).get(FORCED)
            if forced is None:
                return None

            def force(output: list[int], logits: Any) -> Any:
                logits.fill_(-math.inf)
                logits[forced[len(output)]] = 0
                return logits

            return force

    return Forcing


def divergence(base: dict[int, float], other: dict[int, float]) -> float:
    """KL(base, other) in nats over the likeliest tokens of base and one rest."""
    floor = min(other.values())
    pairs = [(math.exp(p), other.get(t, floor)) for t, p in base.items()]
    rest = max(1e-9, 1 - sum(p for p, _ in pairs))
    other_rest = max(1e-9, 1 - sum(math.exp(q) for _, q in pairs))
    total = sum(p * (math.log(p) - q) for p, q in pairs if p > 0)
    return total + rest * math.log(rest / other_rest)


def likeliest(step: dict[int, float]) -> int:
    """The most probable token."""
    return max(step, key=step.__getitem__)


def main() -> None:
    """Run and print the table, one line a method as it is done."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--codec", default="fp16")
    parser.add_argument("--tokens", type=int, default=1200)
    parser.add_argument("--ratio", type=int, action="append")
    parser.add_argument("--workload", action="append", help="as for kvthrift loadtest")
    parser.add_argument("--method", action="append", help="names of the table (default: all)")
    parser.add_argument("--out")
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    runner, rows = Runner(options.codec), []
    base = runner.next_tokens("all", options.tokens)
    tokenizer = LocalTokenizer(str(get_model("smollm2-135m")))
    items = [
        item
        for workload in options.workload or [w.format(tokens=options.tokens) for w in WORKLOADS]
        for item in parse_workload(workload).items(tokenizer, 0, MAX_LEN)
    ]
    chosen = [("1x", "all", "all")]
    for ratio in options.ratio or RATIOS:
        named = methods(ratio, options.tokens)
        chosen += [(f"{ratio}x", n, named[n]) for n in options.method or named]
    for ratio_name, name, method in chosen:
        scores = runner.scores(method, items)
        pairs = list(zip(base, runner.next_tokens(method, options.tokens), strict=True))
        scores["KL"] = statistics.mean(divergence(a, b) for a, b in pairs)
        scores["agrees"] = statistics.mean(likeliest(a) == likeliest(b) for a, b in pairs)
        rows.append({"ratio": ratio_name, "name": name, "method": method, **scores})
        shown = "  ".join(f"{task} {value:.3f}" for task, value in scores.items())
        print(f"{ratio_name} {name}: {shown}", flush=True)
        if options.out:
            _save(options.out, rows)


def _save(path: str | Path, rows: list[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
