"""Whole server, decoding at long context: stock vLLM and policies, one after the other.

    python benchmarks/end_to_end.py [--policy kivi-4bit ...] [--streams 8]

Every server gets the same model, threads and flags (eager: compiling takes minutes and leaves
attention alone). The prompts share their first 4000 tokens, so that prefill ends in minutes;
2000 tokens of each are its own. Prints time to first token of a lone 6000-token prompt,
output tokens/s from the moment when all streams decode, and the ratio to stock.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
from pathlib import Path

from loadtest.client import Answer, Client
from loadtest.haystack import ESSAY
from loadtest.process import running_server

FLAGS = ["--enforce-eager", "--max-model-len", "8192", "--max-num-batched-tokens", "512",
         "--kv-cache-memory-bytes", str(3 * 2**30), "--disable-uvicorn-access-log"]  # fmt: skip


def text(words: int, seed: int) -> str:
    """Essay sentences in random order, about ``words`` words."""
    rng, parts, total = random.Random(seed), [], 0
    while total < words:
        parts.append(rng.choice(ESSAY))
        total += len(parts[-1].split())
    return " ".join(parts)


async def measure(url: str, streams: int, tokens: int) -> tuple[float, int, float]:
    """TTFT of a lone prompt (s), its tokens, and output tokens/s of concurrent streams."""
    shared = text(3350, seed=0)
    prompts = [f"{shared} {text(1680, seed=i + 1)}" for i in range(streams)]
    async with Client(url, timeout=1800) as client:
        await client.complete("Warm-up, unlike any prompt that is measured:", 4)
        alone = await client.complete(prompts[0], 1)
        answers = await asyncio.gather(*(client.complete(p, tokens) for p in prompts))
    for answer in (alone, *answers):
        if answer.error:
            raise SystemExit(f"a request failed: {answer.error}")
    return alone.ttft, alone.prompt_tokens, rate(answers)


def rate(answers: list[Answer]) -> float:
    """Tokens/s between the last first token and the first last token: all streams decode."""
    begin, end = max(a.arrivals[0] for a in answers), min(a.arrivals[-1] for a in answers)
    if end <= begin:
        raise SystemExit("the streams never decoded together: ask for more --tokens")
    return sum(begin < t <= end for a in answers for t in a.arrivals) / (end - begin)


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--policy", action="append")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    print(f"{'':14}{'prompt':>8}{'TTFT s':>9}{'x stock':>9}{'out tok/s':>11}{'x stock':>9}")
    base: tuple[float, float] | None = None
    for policy in (None, *(options.policy or ["kivi-4bit", "kivi-2bit", "fp16"])):
        flags = [options.model, *FLAGS, *(["--cache-policy", policy] if policy else [])]
        with (
            tempfile.TemporaryDirectory() as folder,
            running_server(flags, Path(folder) / "log") as server,
        ):
            ttft, prompt, speed = asyncio.run(measure(server.url, options.streams, options.tokens))
        base = base or (ttft, speed)
        print(
            f"{policy or 'stock float32':14}{prompt:8}{ttft:9.1f}{ttft / base[0]:9.2f}"
            f"{speed:11.1f}{speed / base[1]:9.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
