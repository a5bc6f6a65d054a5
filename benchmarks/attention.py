"""Attention of one layer: our kernels beside stock vLLM's CPU_ATTN, same shapes, same threads.

Usage: ``python -m benchmarks.attention [--seqs 8] [--tokens 8192] [--rounds 15] [--isa avx2]
[--dtype bfloat16] [--policy kivi-4bit --policy rotated-4bit]`` for decode, ``--seqs 1 --fresh
512`` for a chunk of a prompt.

Prints, per shape and policy: median milliseconds of one layer, the ratio to stock vLLM with the
same dtype of the model in the same rounds, billions of floating-point operations a second, the
share of the memory-bandwidth bound (bytes of pages read / measured read bandwidth / time), and the
error that rounding in the kernel adds beside the codec's own error.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from cache_policies.kernels.contract import Batch, Shape
from cache_policies.kernels.cpu import CpuKernel, supported_isas
from cache_policies.pages.codecs.affine import AffineCodec
from cache_policies.pages.layout import PageLayout
from cache_policies.pages.plan import Plan
from cache_policies.policy import parse

if TYPE_CHECKING:
    from collections.abc import Callable

SHAPES = ((9, 3, 64), (32, 8, 128))
POLICIES = (
    "fp16", "int8", "flexgen-4bit", "kivi-4bit", "kivi-2bit", "rotated-4bit", "rotated-3bit",
)  # fmt: skip
BUDGETED = ("fp16", "kivi-4bit")  # what decode costs once all but a budget is dropped
PAGE = 128
LAYERS = 4  # rotated, so that no layer's pages stay in the last-level cache


@dataclass(frozen=True)
class Ours:
    """A step of some layers with our kernel; each has pages of its own."""

    kernel: CpuKernel
    batch: Batch
    pages: list[torch.Tensor]
    fresh: tuple[torch.Tensor, ...]  # query, key, value, output
    page_bytes: int  # that one layer reads

    def step(self) -> None:
        """Attend in every layer."""
        for layer in self.pages:
            self.kernel.attend(layer, self.batch, *self.fresh)


def ours(
    policy: str,
    seqs: int,
    tokens: int,
    fresh: int,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    isa: str | None,
    layers: int = LAYERS,
    threads: int = 0,
) -> Ours:
    """Random tokens under a policy; threads 0: as many as torch takes."""
    heads, kv_heads, head_size = shape
    layout = PageLayout(parse(policy).codec, head_size, PAGE, dtype)
    plan = Plan.of(layout)
    row = plan.pages(tokens + fresh)
    count = seqs * row
    # Random bytes would hold NaN scales: encode one page of random tokens and copy it.
    page = torch.zeros(kv_heads, layout.head_bytes, dtype=torch.uint8)
    tokens_of_page = torch.randn(2, kv_heads, PAGE, head_size)
    layout.codec.write(layout.views(page), 0, *tokens_of_page)
    table = torch.randperm(count).to(torch.int32).reshape(seqs, row)
    start = np.arange(seqs + 1, dtype=np.int32) * fresh
    query = torch.randn(seqs * fresh, heads, head_size).to(dtype)
    key, value = torch.randn(2, seqs * fresh, kv_heads, head_size).to(dtype)
    used = int(plan.store_pages(tokens)) * layout.head_bytes
    return Ours(
        CpuKernel(layout, Shape(heads, kv_heads, head_size**-0.5), isa=isa, num_threads=threads),
        Batch.of(plan, start, np.full(seqs, tokens, dtype=np.int32), table),
        [page.repeat(count, 1, 1).contiguous() for _ in range(layers)],
        (query, key, value, torch.empty_like(query)),
        seqs * kv_heads * used,
    )


def stock(
    seqs: int, tokens: int, fresh: int, shape: tuple[int, int, int], dtype: torch.dtype
) -> Callable[[], None]:
    """The same step through stock vLLM's operator."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    heads, kv_heads, head_size = shape
    isa = _get_attn_isa(dtype, PAGE, head_size, "auto")
    blocks = -(-(tokens + fresh) // PAGE)
    caches = [
        torch.randn(seqs * blocks, kv_heads, 2 * PAGE, head_size).to(dtype) for _ in range(LAYERS)
    ]
    table = torch.randperm(seqs * blocks).to(torch.int32).reshape(seqs, blocks)
    query = torch.randn(seqs * fresh, heads, head_size).to(dtype)
    output = torch.empty_like(query)
    start = torch.arange(seqs + 1, dtype=torch.int32) * fresh
    lengths = torch.full((seqs,), tokens + fresh, dtype=torch.int32)

    def step() -> None:
        metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=seqs, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_size,
            seq_lens=lengths, dtype=dtype, query_start_loc=start, causal=True,
            sliding_window_size=-1, isa=isa, enable_kv_split=True,
        )  # fmt: skip
        for cache in caches:
            keys, values = cache.chunk(2, dim=2)
            ops.cpu_attention_with_kv_cache(
                query=query, key_cache=keys, value_cache=values, output=output,
                query_start_loc=start, seq_lens=lengths, scale=head_size**-0.5, causal=True,
                alibi_slopes=None, sliding_window=-1, block_table=table, softcap=0,
                scheduler_metadata=metadata, s_aux=None,
            )  # fmt: skip

    return step


def bandwidth() -> float:
    """Bytes a second that all threads read from memory: the best of five sums over 512 MiB."""
    block = torch.ones(2**27)
    best = 0.0
    for _ in range(5):
        begin = time.perf_counter()
        block.sum()
        best = max(best, block.nbytes / (time.perf_counter() - begin))
    return best


def errors(
    policy: str, shape: tuple[int, int, int], isa: str | None, tokens: int = 4096
) -> tuple[float, float]:
    """Relative error of the codec, and of integer arithmetic against the same stored codes."""
    heads, kv_heads, head_size = shape
    layout = PageLayout(parse(policy).codec, head_size, PAGE, torch.float32)
    plan, form = Plan.of(layout), Shape(heads, kv_heads, head_size**-0.5)
    row = int(plan.pages(tokens + 1))
    pages = torch.zeros(row, kv_heads, layout.head_bytes, dtype=torch.uint8)
    table = torch.arange(row, dtype=torch.int32)[None]
    key, value = torch.randn(2, tokens, kv_heads, head_size)
    fresh = torch.randn(2, 1, kv_heads, head_size)
    query = torch.randn(1, heads, head_size) * 2
    exact = CpuKernel(layout, form, isa=isa, rounding=False)
    fill = Batch.of(plan, np.array([0, tokens], dtype=np.int32), np.zeros(1, dtype=np.int32), table)
    exact.append(pages, fill, key, value)
    one = np.array([0, 1], dtype=np.int32)
    step = Batch.of(plan, one, np.array([tokens], dtype=np.int32), table)
    results = []
    for kernel in (exact, CpuKernel(layout, form, isa=isa)):
        output = torch.empty_like(query)
        kernel.attend(pages, step, query, fresh[0], fresh[1], output)
        results.append(output)
    keys = torch.cat([key, fresh[0]]).transpose(0, 1)
    values = torch.cat([value, fresh[1]]).transpose(0, 1)
    full = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None], keys[None], values[None], enable_gqa=True
    )[0].transpose(0, 1)
    relative = lambda a, b: float((a - b).norm() / b.norm())  # noqa: E731
    return relative(results[0], full), relative(results[1], results[0])


def _rounds(name: str) -> bool:
    """Whether pages of a row's policy are multiplied as rounded integers."""
    return "," not in name and isinstance(parse(name).codec, AffineCodec)


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--seqs", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--fresh", type=int, default=1, help="new tokens of a sequence")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--isa", choices=supported_isas(), help="of our kernels")
    parser.add_argument("--policy", action="append", help="instead of the usual ones; repeatable")
    parser.add_argument(
        "--budget", type=int, default=1024, help="tokens kept by an evicting method"
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    speed = bandwidth()
    print(f"threads {torch.get_num_threads()}, read bandwidth {speed / 1e9:.1f} GB/s")
    for shape in SHAPES:
        seqs, tokens, fresh = options.seqs, options.tokens, options.fresh
        stock_name, dtype = f"stock {options.dtype}", getattr(torch, options.dtype)
        steps = {stock_name: stock(seqs, tokens, fresh, shape, dtype)}
        reads = {stock_name: seqs * tokens * shape[1] * shape[2] * 2 * dtype.itemsize}
        lengths = dict.fromkeys((stock_name, *(options.policy or POLICIES)), tokens)
        budgeted = [policy for policy in BUDGETED if policy in lengths]
        lengths.update({f"{policy}, {options.budget}": options.budget for policy in budgeted})
        for name, length in list(lengths.items())[1:]:
            policy = name.split(",", maxsplit=1)[0]
            layers = ours(policy, seqs, length, fresh, shape, dtype, options.isa)
            steps[name], reads[name] = layers.step, layers.page_bytes
        times: dict[str, list[float]] = {name: [] for name in steps}
        for step in steps.values():
            step()
        for _ in range(options.rounds):
            for name, step in steps.items():
                begin = time.perf_counter()
                step()
                times[name].append((time.perf_counter() - begin) / LAYERS)
        base = statistics.median(times[stock_name])
        print(
            f"\nshape (query heads, KV heads, head size) = {shape}, "
            f"{seqs} sequences x {tokens} tokens and {fresh} new"
        )
        print(
            f"{'':16}{'ms/layer':>10}{'x stock':>9}{'GFLOP/s':>9}{'of bound':>10}"
            f"{'codec err':>11}{'int err':>10}"
        )
        for name in steps:
            median = statistics.median(times[name])
            bound = reads[name] / speed / median
            pairs = seqs * fresh * (lengths[name] + (fresh + 1) / 2)  # of a query and a key
            speed_of = 4 * pairs * shape[0] * shape[2] / median / 1e9
            codec = f"{'':>11}{'':>10}"
            if name != stock_name and _rounds(name):
                codec = "{:>11.4f}{:>10.4f}".format(*errors(name, shape, options.isa))
            ratio = f"{base / median:9.2f}{speed_of:9.1f}{bound:10.0%}"
            print(f"{name:16}{median * 1e3:10.2f}{ratio}{codec}")


if __name__ == "__main__":
    main()
