"""Recurrences in C++ beside token-by-token loops in torch, at the shape of a published model.

    .venv/bin/python -m benchmarks.scans [--tokens 512] [--isa avx2]

Prints milliseconds of one layer, the least of several runs, and the ratios: to our oracle, whose
loop is a few vectorized operations a token, and to what transformers runs without its CUDA kernels.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import TYPE_CHECKING, Any

import torch

from linear_models.scans import cpu, reference
from linear_models.scans.batch import Batch

if TYPE_CHECKING:
    from collections.abc import Callable

CHANNELS, SIZE, WIDTH = 5120, 16, 4  # mamba-2.8b
HEADS, HEAD = 32, 64  # rwkv-5-world-1b5 and RWKV7-Goose-World3-1.5B
LRU = 2560  # recurrentgemma-2b


def milliseconds(run: Callable[[], None], times: int) -> float:
    """Least of several runs, after one that warms up."""
    best = float("inf")
    for _ in range(times + 1):
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
    return best * 1e3


def mamba1(tokens: int, requests: int, dtype: torch.dtype, isa: str) -> None:
    """Time the convolution and the scan of a step with so many requests of as many tokens each."""
    each = tokens // requests
    both = torch.randn(tokens, 2 * CHANNELS).to(dtype)
    x, gate = both.chunk(2, dim=1)
    inner = torch.randn(tokens, 2 * SIZE).to(dtype)
    dt, out = torch.randn(tokens, CHANNELS).to(dtype), torch.empty(tokens, CHANNELS, dtype=dtype)
    a, d, bias = -torch.rand(CHANNELS, SIZE), torch.randn(CHANNELS), torch.randn(CHANNELS)
    weight = torch.randn(CHANNELS, WIDTH)
    batch = Batch(
        torch.arange(0, tokens + 1, each, dtype=torch.int32),
        torch.arange(requests, dtype=torch.int32),
        torch.ones(requests, dtype=torch.bool),
    )
    seen = torch.randn(requests, WIDTH - 1, CHANNELS).to(dtype)
    h = torch.randn(requests, CHANNELS, SIZE)
    scan = (x, dt, a, inner[:, :SIZE], inner[:, SIZE:], d, bias, gate, h, batch, out)
    conv = (x, weight, bias, seen, batch, out)
    for name, given in (("selective_scan", scan), ("causal_conv", conv)):
        theirs = getattr(reference, name)
        ours = getattr(cpu, name)
        fast = milliseconds(lambda f=ours, g=given: f(*g, isa=isa), 20)  # type: ignore[misc]
        slow = milliseconds(lambda f=theirs, g=given: f(*g), 2)  # type: ignore[misc]
        line = f"{name:14} {requests:2} x {each:3} tokens  {str(dtype)[6:]:8}  {isa} {fast:6.2f} ms"
        line += f"  oracle {slow:6.1f} ms, {slow / fast:3.0f} x"
        if requests == 1 and name == "selective_scan":
            theirs = milliseconds(lambda g=given: transformers_scan(*g), 2)  # type: ignore[misc]
            line += f"  transformers {theirs:6.1f} ms, {theirs / fast:3.0f} x"
        print(line)


def one_request(tokens: int) -> Batch:
    """All tokens are of one request, whose state is there."""
    ends, slot = torch.tensor([0, tokens], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    return Batch(ends, slot, torch.ones(1, dtype=torch.bool))


def wkv5(tokens: int, isa: str) -> None:
    """Time RWKV-5's recurrence, at decays from where training begins to ten times as fast."""
    inputs = [torch.randn(tokens, HEADS * HEAD) for _ in range(4)]
    decay = torch.exp(-torch.exp(torch.rand(HEADS, HEAD) * 7 - 6))
    given = (*inputs[:3], decay, torch.randn(HEADS, HEAD), torch.zeros(1, HEADS, HEAD, HEAD))
    _beside_oracle("wkv5", (*given, one_request(tokens), inputs[3]), tokens, isa)


def wkv7(tokens: int, isa: str) -> None:
    """Time RWKV-7's recurrence, at decays of all speeds that it has."""
    inputs = [torch.randn(tokens, HEADS * HEAD) for _ in range(7)]
    removed = torch.nn.functional.normalize(inputs[4].unflatten(1, (HEADS, HEAD)), dim=-1)
    given = (*inputs[:4], removed.flatten(1), torch.rand(tokens, HEADS * HEAD))
    state = torch.zeros(1, HEADS, HEAD, HEAD)
    _beside_oracle("wkv7", (*given, state, one_request(tokens), inputs[6]), tokens, isa)


def rg_lru(tokens: int, isa: str) -> None:
    """Time Griffin's recurrence with its sigmoids, exponential and root, without its products."""
    inputs = [torch.randn(tokens, LRU) for _ in range(4)]
    rate = -8 * torch.nn.functional.softplus(torch.randn(LRU) - 5)
    given = (*inputs[:3], rate, torch.zeros(1, LRU))
    _beside_oracle("rg_lru", (*given, one_request(tokens), inputs[3]), tokens, isa)


def _beside_oracle(name: str, given: tuple[Any, ...], tokens: int, isa: str) -> None:
    fast = milliseconds(lambda: getattr(cpu, name)(*given, isa=isa), 20)
    slow = milliseconds(lambda: getattr(reference, name)(*given), 5)
    line = f"{name:14}  1 x {tokens:3} tokens  float32   {isa} {fast:6.2f} ms"
    print(f"{line}  oracle {slow:6.1f} ms, {slow / fast:4.1f} x")


def transformers_scan(
    x: torch.Tensor, dt: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor,
    d: torch.Tensor, bias: torch.Tensor, gate: torch.Tensor, *_: object,
) -> None:  # fmt: skip
    """The loop of the transformers library, from zeros: columns are tokens there."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    rows = [m.T[None] for m in (x, dt, b, c, gate)]
    mamba_selective_scan(
        rows[0], rows[1], a, rows[2], rows[3], d, rows[4], bias, delta_softplus=True
    )


def main() -> None:
    """Time every recurrence."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--isa", choices=cpu.supported_isas(), default=cpu.supported_isas()[0])
    asked = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    print(f"{CHANNELS} channels, state {SIZE}; {torch.get_num_threads()} threads on {cores} cores")
    for dtype in (torch.float32, torch.bfloat16):
        mamba1(asked.tokens, 1, dtype, asked.isa)
    mamba1(32, 32, torch.bfloat16, asked.isa)
    wkv5(asked.tokens, asked.isa)
    wkv7(asked.tokens, asked.isa)
    rg_lru(asked.tokens, asked.isa)


if __name__ == "__main__":
    main()
