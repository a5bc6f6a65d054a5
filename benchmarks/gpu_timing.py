"""Decode and prefill of the Triton kernels against torch's attention and our float16 pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu_machine import Row, memory_bandwidth, seconds
from cache_policies.kernels.reference import ReferenceKernel
from cache_policies.kernels.triton.kernel import TritonKernel
from cache_policies.pages.codecs.packing import PLANES
from tests.kernels.harness import EXACT, Setup

if TYPE_CHECKING:
    from cache_policies.kernels.contract import Batch

POLICIES = ("fp16", "int8", "flexgen-4bit", "kivi-4bit", "kivi-2bit")
LLAMA = {"heads": 32, "kv_heads": 8, "head_size": 128}


class Layer:
    """One attention layer on a device, whose requests hold ``context`` tokens each."""

    def __init__(self, policy: str, seqs: int, context: int, device: str, **shape: int) -> None:
        shape = shape or LLAMA
        self.setup = Setup.make(
            policy, seqs=seqs, max_tokens=context + 512, dtype=torch.bfloat16, packing=PLANES,
            **shape,  # type: ignore[arg-type]
        )  # fmt: skip
        self.device, self.seqs, self.context = device, seqs, context
        self.kernel = TritonKernel(self.setup.layout, self.setup.shape)
        self.pages = self.setup.pages.to(device)
        self.setup.block_table = self.setup.block_table.to(device)
        _, key, value = self.tokens(seqs * context, 1)
        self.kernel.append(self.pages, self.setup.batch([0] * seqs, [context] * seqs), key, value)

    def tokens(self, count: int, seed: int) -> list[torch.Tensor]:
        """Query, key and value of ``count`` tokens."""
        rng = torch.Generator(self.device).manual_seed(seed)
        shape, size = self.setup.shape, self.setup.layout.head_size
        heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        options = {"generator": rng, "device": self.device, "dtype": torch.bfloat16}
        return [torch.randn(count, h, size, **options) for h in heads]  # type: ignore[call-overload]

    def batch(self, fresh: int) -> Batch:
        """A step in which every request has ``fresh`` tokens."""
        return self.setup.batch([self.context] * self.seqs, [fresh] * self.seqs)

    @property
    def cache_bytes(self) -> int:
        """Bytes of store and ring that a step reads."""
        batch, layout = self.batch(1), self.setup.layout
        row = 2 * layout.head_size * layout.ring_dtype.itemsize
        stored = int(batch.stored.sum()) * layout.head_bytes // layout.page_tokens
        return (stored + int(batch.ring.sum()) * row) * self.setup.shape.num_kv_heads

    def stock(self, fresh: int) -> tuple[Any, ...]:
        """Tensors and options of torch's attention over the same number of tokens."""
        total, shape = self.context + fresh, self.setup.shape
        size = (self.seqs, shape.num_kv_heads, total, self.setup.layout.head_size)
        key, value = (torch.randn(size, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        query = key.new_ones(self.seqs, shape.num_heads, fresh, size[-1])
        if fresh == 1:
            return query, key, value, {"enable_gqa": True}
        mask = torch.ones(fresh, total, dtype=torch.bool, device=self.device).tril(self.context)
        return query, key, value, {"enable_gqa": True, "attn_mask": mask}


def decode_rows(seqs: int = 32, context: int = 8192) -> list[Row]:
    """Time of a decode step's attention, and the share of the memory's speed."""
    speed, rows, stock_time = memory_bandwidth(), [], 0.0
    for policy in POLICIES:
        layer = Layer(policy, seqs, context, "cuda")
        tokens, batch = layer.tokens(seqs, 2), layer.batch(1)
        out = torch.empty_like(tokens[0])
        took = seconds(lambda: layer.kernel.attend(layer.pages, batch, *tokens, out))  # noqa: B023
        if not rows:
            query, key, value, options = layer.stock(1)
            stock_time = seconds(
                lambda: scaled_dot_product_attention(query, key, value, **options)  # noqa: B023
            )
        share = layer.cache_bytes / took / speed
        values = {"seconds": took, "share_of_bandwidth": share, "stock_seconds": stock_time}
        note = (f"{took * 1e6:.0f} us, {share:.0%} of {speed / 1e12:.2f} TB/s; torch "
                f"{stock_time * 1e6:.0f} us")  # fmt: skip
        rows.append(Row(f"decode {policy}, {seqs} x {context}", None, note, values))
    return rows


def prefill_rows(fresh: int = 2048, context: int = 6144) -> list[Row]:
    """Time of a chunk of prefill over what is there already."""
    rows, stock_time = [], 0.0
    for policy in POLICIES:
        layer = Layer(policy, 1, context, "cuda")
        tokens, batch = layer.tokens(fresh, 2), layer.batch(fresh)
        out = torch.empty_like(tokens[0])
        took = seconds(lambda: layer.kernel.attend(layer.pages, batch, *tokens, out))  # noqa: B023
        if not rows:
            query, key, value, options = layer.stock(fresh)
            stock_time = seconds(
                lambda: scaled_dot_product_attention(query, key, value, **options)  # noqa: B023
            )
        values = {"seconds": took, "stock_seconds": stock_time}
        note = f"{took * 1e3:.2f} ms; torch {stock_time * 1e3:.2f} ms"
        rows.append(Row(f"prefill {policy}, {fresh} over {context}", None, note, values))
    return rows


def sdpa_row(device: str, seqs: int = 2, context: int = 300, **shape: int) -> Row:
    """Unquantized pages give what torch's attention gives."""
    layer = Layer("raw", seqs, context, device, **shape)
    _, key, value = layer.tokens(seqs * context, 1)
    query, fresh_key, fresh_value = layer.tokens(seqs, 2)
    out = torch.empty_like(query)
    layer.kernel.attend(layer.pages, layer.batch(1), query, fresh_key, fresh_value, out)
    keys, values = (
        torch.cat([old.unflatten(0, (seqs, context)), new[:, None]], 1).transpose(1, 2)
        for old, new in ((key, fresh_key), (value, fresh_value))
    )
    expected = scaled_dot_product_attention(query[:, :, None], keys, values, enable_gqa=True)
    worst = float((expected[:, :, 0] - out).abs().max())
    return Row("raw pages against torch's attention", worst < EXACT[torch.bfloat16],
               f"largest difference {worst:.1e}", {"largest": worst})  # fmt: skip


def graph_row() -> Row:
    """A decode step in a CUDA graph: replayed with new tokens, as run without one."""
    layer = Layer("kivi-4bit", 4, 1000, "cuda")
    tokens, batch = layer.tokens(4, 2), layer.batch(1)
    out = torch.empty_like(tokens[0])

    def step() -> None:
        layer.kernel.attend(layer.pages, batch, *tokens, out)
        layer.kernel.append(layer.pages, batch, *tokens[1:])

    before = layer.pages.clone()
    step()  # compiles, and copies the counts to the device
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for x, y in zip(tokens, layer.tokens(4, 3), strict=True):
        x.copy_(y)
    layer.pages.copy_(before)
    step()
    expected = out.clone(), layer.pages.clone()
    layer.pages.copy_(before)
    graph.replay()
    torch.cuda.synchronize()
    same = torch.equal(out, expected[0]) and torch.equal(layer.pages, expected[1])
    return Row("CUDA graph of a decode step", same, "replay equals a plain step, output and pages")


def reference_row(device: str) -> Row:
    """A decode step of one codec against the reference: the smallest sign of life."""
    layer = Layer("kivi-4bit", 1, 140, device, heads=4, kv_heads=2, head_size=64)
    tokens, batch = layer.tokens(1, 2), layer.batch(1)
    out, expected = (torch.empty_like(tokens[0]) for _ in range(2))
    layer.kernel.attend(layer.pages, batch, *tokens, out)
    host = [x.cpu() for x in tokens]
    reference = ReferenceKernel(layer.setup.layout, layer.setup.shape)
    layer.setup.block_table = layer.setup.block_table.cpu()
    there = torch.empty_like(host[0])
    reference.attend(layer.pages.cpu(), layer.batch(1), *host, there)
    expected = there.to(device)
    worst = float((expected - out).abs().max())
    return Row("kivi-4bit against the reference", worst < 4e-2, f"largest difference {worst:.1e}")
