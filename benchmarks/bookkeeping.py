"""What a long prompt costs beside the model: hashing, scheduling, and the work of a step in Python.

Usage: ``python -m benchmarks.bookkeeping [--lengths 8192 32768 131072] [--policy kivi-4bit ...]``

An engine for each policy (``stock`` is vLLM's own cache), of a random model of one layer with one
head of 64, prefix caching on, chunks of 1024 tokens; a request of each length with an answer of 64
tokens. *Hashing* is the making of the request in the engine, block hashes included; *scheduling* is
the scheduler before and after all steps. *Decode step*: the median of the answer's steps, of which
the scheduler has *its scheduling*. The rest of a step is the model and the preparing of its input.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

from benchmarks.end_to_end import MARK, result_of
from benchmarks.eviction import engine, tiny

if TYPE_CHECKING:
    from collections.abc import Callable

STOCK = "stock"
POLICIES = (
    STOCK, "kivi-4bit", "snapkv(budget=1024)+kivi-4bit", "streaming-llm(window=1020)+kivi-4bit",
    "infllm+kivi-4bit", "sparse-prefill(coverage=0.95)+kivi-4bit",
)  # fmt: skip
LENGTHS = (8192, 32768, 131072)
CHUNK, ANSWER = 1024, 64
MEMORY = 512 << 20  # of the cache


class Timed:
    """A method of an object, whose calls are timed from now on."""

    def __init__(self, owner: Any, name: str) -> None:
        self.seconds: list[float] = []
        self._call: Callable[..., Any] = getattr(owner, name)
        setattr(owner, name, self)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        begin = time.perf_counter()
        try:
            return self._call(*arguments, **named)
        finally:
            self.seconds.append(time.perf_counter() - begin)

    def take(self) -> list[float]:
        """Seconds of the calls since the last time."""
        taken, self.seconds = self.seconds, []
        return taken


def measure(policy: str, folder: str, lengths: list[int]) -> list[dict[str, float]]:
    """Seconds of a request of each length."""
    from vllm import SamplingParams

    llm = engine(
        folder, None if policy == STOCK else policy, kv_cache_memory_bytes=MEMORY,
        max_model_len=max(lengths), max_num_batched_tokens=CHUNK, max_num_seqs=1,
        skip_tokenizer_init=True,
    )  # fmt: skip
    core = llm.llm_engine
    inner, rng = core.engine_core.engine_core, random.Random(0)
    making = Timed(inner, "preprocess_add_request")
    before, after = (Timed(inner.scheduler, n) for n in ("schedule", "update_from_output"))
    chosen = SamplingParams(max_tokens=ANSWER, ignore_eos=True, detokenize=False, temperature=0)
    rows = []
    for length in lengths:
        prompt = [rng.randrange(256) for _ in range(length - ANSWER)]
        core.add_request(str(length), {"prompt_token_ids": prompt}, chosen)
        steps = []
        while core.has_unfinished_requests():
            begin = time.perf_counter()
            core.step()
            steps.append(time.perf_counter() - begin)
        scheduling = [a + b for a, b in zip(before.take(), after.take(), strict=True)]
        rows.append({
            "length": length, "seconds": sum(steps), "hashing": sum(making.take()),
            "scheduling": sum(scheduling), "step": statistics.median(steps[-ANSWER // 2 :]),
            "step_scheduling": statistics.median(scheduling[-ANSWER // 2 :]),
        })  # fmt: skip
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bookkeeping")
    parser.add_argument("--policy", nargs="+", default=list(POLICIES), dest="policies")
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--call", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.call:
        print(MARK + json.dumps(measure(*json.loads(given.call))))
        return
    columns = "all s", "hashing s", "scheduling s", "decode step ms", "its scheduling ms"
    print(f"{'':42}{'tokens':>9}" + "".join(f"{c:>19}" for c in columns))
    with tempfile.TemporaryDirectory() as folder:
        tiny(folder, longest=max(given.lengths))
        for policy in given.policies:
            arguments = json.dumps([policy, folder, given.lengths])
            for row in result_of(
                [sys.executable, "-m", "benchmarks.bookkeeping", "--call", arguments]
            ):
                cells = row["seconds"], row["hashing"], row["scheduling"]
                line = "".join(f"{c:19.3f}" for c in cells)
                line += "".join(f"{1000 * row[n]:19.2f}" for n in ("step", "step_scheduling"))
                print(f"{policy:42}{row['length']:9,}{line}", flush=True)


if __name__ == "__main__":
    main()
