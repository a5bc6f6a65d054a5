"""What a cut costs where tokens share scales: moved by the kernel, or by way of floats.

Usage: ``python -m benchmarks.cuts [--policy kivi-4bit] [--heads 8] [--head-size 128] [--rounds 9]``

One layer of one request, on the threads that torch takes. Prints milliseconds, the median of the
rounds, of ``Moving.move`` and of ``read`` and ``write``, which other cuts go through
(docs/architecture.md), for a prompt of 8192 tokens that keeps 1024: every eighth, the last ones,
whose groups stay whole, and those beginning one token earlier; and for a request of 1024 tokens
that drops one in its own pages.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import numpy as np
import torch

from cache_policies.kernels.contract import Batch, Shape
from cache_policies.kernels.cpu import CpuKernel
from cache_policies.kernels.moves import Moves, move_rows
from cache_policies.pages.layout import PageLayout
from cache_policies.pages.plan import Plan
from cache_policies.policy import parse

PAGE, PROMPT, KEPT = 128, 8192, 1024


def cases() -> dict[str, tuple[int, torch.Tensor]]:
    """Tokens held before, and those kept, by what is kept."""
    last = torch.arange(PROMPT - KEPT, PROMPT)
    return {
        "every eighth token": (PROMPT, torch.arange(0, PROMPT, PROMPT // KEPT)),
        "the last, whole groups": (PROMPT, last),
        "the last, one token off": (PROMPT, last - 1),
        "all but the 512th, in place": (KEPT, torch.arange(KEPT)[torch.arange(KEPT) != 512]),
    }


def moves(layout: PageLayout, heads: int, held: int, kept: torch.Tensor) -> Moves:
    """The kept tokens to the front: of the same pages, or of those behind the prompt's."""
    plan = Plan.of(layout)
    rows = plan.ring_pages + 2 * int(plan.store_pages(held))
    table = torch.randperm(rows, dtype=torch.int32)[None]
    start = np.zeros(2, dtype=np.int32)
    source = Batch.of(plan, start, np.array([held], dtype=np.int32), table)
    stored = torch.from_numpy(plan.stored(np.array([len(kept)], dtype=np.int32)))
    behind = 0 if held == KEPT else int(plan.store_pages(held))
    target = replace(
        source, stored=stored, ring=len(kept) - stored, stored_after=stored,
        store_row=source.store_row + behind,
    )  # fmt: skip
    places = torch.arange(len(kept))
    index, number = (x.int().expand(heads, -1).contiguous() for x in (places, kept))
    return Moves(source, target, index, number, torch.tensor([0, len(kept)], dtype=torch.int32))


def milliseconds(policy: str, heads: int, head_size: int, case: str, rounds: int) -> list[float]:
    """Medians: moved by the kernel, by way of floats."""
    held, kept = cases()[case]
    layout = PageLayout(parse(policy).codec, head_size, PAGE, torch.float32)
    kernel = CpuKernel(layout, Shape(heads, heads, head_size**-0.5))
    asked = moves(layout, heads, held, kept)
    count = asked.source.block_table.numel()
    pages = torch.zeros(count, heads, layout.head_bytes, dtype=torch.uint8)
    key, value = torch.randn(2, held, heads, head_size)
    whole = np.array([0, held], dtype=np.int32)
    prompt = Batch.of(Plan.of(layout), whole, np.zeros(1, np.int32), asked.source.block_table)
    kernel.append(pages, prompt, key, value)
    nothing = key[:0]
    ways = (
        lambda p: kernel.move(p, nothing, nothing, asked),
        lambda p: move_rows(kernel, p, nothing, nothing, asked),
    )
    times: list[list[float]] = [[], []]
    for _ in range(rounds + 1):
        for way, taken in zip(ways, times, strict=True):
            fresh = pages.clone()
            begin = time.perf_counter()
            way(fresh)
            taken.append((time.perf_counter() - begin) * 1e3)
    return [statistics.median(taken[1:]) for taken in times]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--policy", action="append")
    parser.add_argument("--heads", type=int, default=8, help="KV heads")
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, {options.heads} KV heads of {options.head_size}")
    print(f"{'ms of a layer':44}{'moved':>8}{'floats':>8}")
    for policy in options.policy or ["kivi-4bit", "kivi-2bit"]:
        for case in cases():
            both = milliseconds(policy, options.heads, options.head_size, case, options.rounds)
            print(f"{f'{policy}, {case}':44}{both[0]:8.2f}{both[1]:8.2f}", flush=True)


if __name__ == "__main__":
    main()
