"""Malformed bodies, headers and policies against a real server.

Usage: ``python -m benchmarks.fuzz [--requests 5000] [--seed 0]``

Mutates good requests in many ways and counts the answers by status. No answer may be a 5xx, none
may hang, and the engine must answer a good request afterwards. While it runs, slow clients hold
connections open with half a request each; a good request must not wait for them.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from loadtest.commands.process import running_server

MODEL = "smollm2-135m"
FLAGS = [
    "--cache-policy", "kivi-4bit", "--kv-cache-memory-bytes", str(64 << 20), "--enforce-eager",
    "--max-model-len", "512", "--disable-uvicorn-access-log", "--policy-alias", "fast=snapkv",
    "--enable-scale-out",
]  # fmt: skip
WAIT = 5  # seconds at most, for a good request afterwards
SAID = [{"role": "user", "content": "Hello there."}]
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Hello there.", "max_tokens": 2},
    "/v1/chat/completions": {"messages": SAID, "max_tokens": 2},
    "/v1/chat/completions/batch": {"messages": [SAID], "max_tokens": 2},
    "/v1/responses": {"input": "Hello there.", "max_output_tokens": 2},
    "/v1/messages": {"messages": SAID, "max_tokens": 2},
    "/v1/messages/count_tokens": {"messages": SAID},
    "/inference/v1/generate": {"token_ids": [5, 6], "sampling_params": {"max_tokens": 2}},
    "/generative_scoring": {"query": "a", "items": ["b"], "label_token_ids": [5, 6]},
    "/tokenize": {"prompt": "Hello there."},
    "/detokenize": {"tokens": [5, 6]},
    "/v1/cache_policies/estimate": {
        "memory_bytes": 1 << 20, "context_tokens": 100, "policies": ["fp16"],
    },
}  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, 0, -1, 1e308, 2**63, 10**40, "", "x" * 5000, "\x00", "\ud83d", "💥", [], [[]], {},
    {"a": {"b": [1]}}, [None], "NaN", -0.0, 1.5, ["x"] * 50,
)  # fmt: skip
POLICIES = (
    "snapkv", "snapkv(", "snapkv()", "snapkv(budget=)", "snapkv(budget=-5)", "snapkv(budget=1e9)",
    "snapkv(budget=99999999999999999999)", "+", "++", "kivi-4bit", "h2o+h2o", "h2o(ratio=nan)",
    "h2o(ratio=inf)", "streaming-llm(window=0)", "all(x=1)", "infllm(topk=0)", "quest(topk=-1)",
    "a" * 10000, "💥", "random(seed=-1)", "tova(budget=64,budget=64)", "lagkv(ratio=1e-9)", " ",
    "pyramidkv(budget=33)", "expected-attention(budget=1)", "snapkv(window=10**9)", "\x00",
)  # fmt: skip


def good(route: str) -> dict[str, Any]:
    """A request that is answered."""
    ours = route.startswith("/v1/cache_policies")
    return copy.deepcopy(ROUTES[route]) | ({} if ours else {"model": MODEL})


def spoiled(route: str, rng: random.Random) -> tuple[bytes, dict[str, str]]:
    """A body and headers, at least one of them wrong in some way."""
    body, headers = good(route), {"Content-Type": "application/json"}
    kind = rng.randrange(8)
    if kind == 0:
        return rng.randbytes(rng.randrange(200)), headers
    if kind == 1:
        whole = json.dumps(body).encode()
        return whole[: rng.randrange(len(whole))], headers
    if kind == 2:
        name = rng.choice(("Content-Type", "X-Request-Id", "Authorization", "Accept"))
        headers = {name: rng.choice(("", "text/xml", "application/json; charset=x", "a" * 4000))}
    elif kind == 3:
        key = rng.choice(("cache_policy", "cache_polcy", "cache_kernel", "\x00", ""))
        asked = {key: rng.choice((*POLICIES, *ODD))}
        body |= rng.choice(
            ({"vllm_xargs": asked}, asked, {"sampling_params": {"extra_args": asked}})
        )
    elif kind == 4:
        body["model"] = f"{MODEL}@{rng.choice(POLICIES)}"
    elif kind == 5:
        body["policies"] = body["prompt_compression"] = rng.choice((*ODD, list(POLICIES)))
    else:
        keys = ("max_tokens", "n", "stop", "stream", "logprobs", "top_p", "temperature", "messages",
                "prompt", "model", "vllm_xargs", "stream_options", "seed", "logit_bias", "tools",
                "response_format", "model_shape", "memory_bytes", "context_tokens", "min_tokens",
                "best_of", "echo", "suffix", "user", "cache_salt", "priority", "input",
                "prompt_compression", "structured_outputs", "use_beam_search", "sampling_params",
                "max_output_tokens", "kv_transfer_params", "instructions", "token_ids", "items",
                "query", "label_token_ids", "tokens", "prompt_logprobs", "stop_token_ids",
                "request_id", "previous_response_id", "truncate_prompt_tokens")  # fmt: skip
        for key in rng.sample(keys, rng.randrange(1, 4)):
            body[key] = rng.choice((*ODD, *body.values()))
    text = json.dumps(body)
    if kind == 7:
        text = text.replace('"', "'", 1) if rng.random() < 0.3 else "[" * rng.randrange(3000) + text
    return text.encode("utf-8", errors="surrogatepass"), headers


async def slow_client(url: str) -> None:
    """Half a request, a byte at a time."""
    host, port = url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
    try:
        while True:
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(1)
    finally:
        writer.close()


async def run(url: str, count: int, seed: int) -> bool:
    """Send, count, judge."""
    rng, statuses, bad = random.Random(seed), Counter[str](), []
    http = httpx.AsyncClient(base_url=url, timeout=60, trust_env=False)
    slow = [asyncio.create_task(slow_client(url)) for _ in range(50)]
    gate = asyncio.Semaphore(16)
    health = Counter[str]()

    async def watch() -> None:
        while True:
            try:
                health[str((await http.get("/health")).status_code)] += 1
            except httpx.HTTPError as error:
                health[type(error).__name__] += 1
            await asyncio.sleep(0.5)

    watching = asyncio.create_task(watch())

    async def one() -> None:
        route = rng.choice(list(ROUTES))
        body, headers = spoiled(route, rng)
        async with gate:
            try:
                answer = await http.post(route, content=body, headers=headers)
                statuses[str(answer.status_code)] += 1
                if answer.is_server_error:
                    bad.append(f"{route} {body[:300]!r}: {answer.text[:300]}")
            except httpx.HTTPError as error:
                statuses[type(error).__name__] += 1
                bad.append(f"{route} {body[:300]!r}: {type(error).__name__}: {error}")

    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(one())
    begin = time.monotonic()
    last = await http.post("/v1/completions", json=good("/v1/completions"))
    waited = time.monotonic() - begin
    for task in (*slow, watching):
        task.cancel()
    print(f"/health meanwhile: {dict(health)}")
    print(f"{count} requests: {dict(statuses)}")
    print(
        f"a good request afterwards, beside 50 slow clients: {last.status_code} in {waited:.2f} s"
    )
    for text in bad[:10]:
        print("bad:", text)
    fine = last.status_code == httpx.codes.OK and waited < WAIT
    return not bad and fine and set(health) == {"200"}


def main() -> None:
    """Serve and send."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server([MODEL, *FLAGS], Path(folder) / "log") as server,
    ):
        fine = asyncio.run(run(server.url, options.requests, options.seed))
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
