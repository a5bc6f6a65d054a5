"""Decode and prefill of the Triton kernels against torch's attention and our float16 pages."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu_machine import Row, memory_bandwidth, seconds
from cache_policies.kernels.reference import ReferenceKernel
from cache_policies.kernels.triton.kernel import TritonKernel
from cache_policies.pages.codecs.packing import PLANES
from tests.kernels.harness import EXACT, Setup

if TYPE_CHECKING:
    from collections.abc import Callable

    from cache_policies.kernels.contract import Batch

POLICIES = ("fp16", "int8", "flexgen-4bit", "kivi-4bit", "kivi-2bit")
LLAMA = {"heads": 32, "kv_heads": 8, "head_size": 128}
# requests, fresh tokens of each, tokens before them
DECODE, PREFILL = (32, 1, 8192), (1, 2048, 6144)
ENDS_GROUP = 1023  # the next token ends a group of KIVI's, which moves to the store


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


def torch_attention(
    seqs: int, fresh: int, context: int, device: str, **shape: int
) -> Callable[[], torch.Tensor]:
    """Torch's attention of ``fresh`` tokens a request over ``context`` others and themselves."""
    heads, kv_heads, size = (shape or LLAMA).values()
    options = {"device": device, "dtype": torch.bfloat16}
    total = context + fresh
    query = torch.randn(seqs, heads, fresh, size, **options)  # type: ignore[call-overload]
    key, value = torch.randn(2, seqs, kv_heads, total, size, **options)  # type: ignore[call-overload]
    # A mask of booleans would rule flash attention out; under this one torch may take another.
    mask = None if fresh == 1 else causal_lower_right(fresh, total)
    asked = SDPAParams(query, key, value, None, 0.0, fresh > 1, True)
    if device == "cuda" and not can_use_flash_attention(asked):
        raise RuntimeError("torch has no flash attention for this")
    return lambda: scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


@cache
def torch_seconds(seqs: int, fresh: int, context: int) -> float:
    """Time of torch's flash attention; a ``RuntimeError`` where torch would take another."""
    call = torch_attention(seqs, fresh, context, "cuda")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return seconds(call)


def torch_row(name: str, seqs: int, fresh: int, context: int) -> Row:
    """The same as a line of the table; that there is none says nothing of our kernels."""
    title = f"{name} torch's flash attention, {fresh} over {context}, {seqs} requests"
    try:
        took = torch_seconds(seqs, fresh, context)
    except RuntimeError as error:
        return Row(title, None, f"not measured: {error}")
    return Row(title, None, f"{took * 1e6:.0f} us", {"seconds": took})


def _beside_torch(seqs: int, fresh: int, context: int, took: float) -> str:
    try:
        return f", {took / torch_seconds(seqs, fresh, context):.2f} x torch's"
    except RuntimeError:  # ``torch_row`` says why
        return ""


def _attention(policy: str, seqs: int, fresh: int, context: int) -> tuple[float, int]:
    """Seconds of a step, and bytes of the cache that it reads."""
    layer = Layer(policy, seqs, context, "cuda")
    tokens, batch = layer.tokens(seqs * fresh, 2), layer.batch(fresh)
    out = torch.empty_like(tokens[0])
    took = seconds(lambda: layer.kernel.attend(layer.pages, batch, *tokens, out))
    return took, layer.cache_bytes


def decode_row(policy: str, seqs: int = DECODE[0], context: int = DECODE[2]) -> Row:
    """Time of a decode step's attention, and the share of the memory's speed."""
    took, size = _attention(policy, seqs, 1, context)
    speed = memory_bandwidth()
    values = {"seconds": took, "share_of_bandwidth": size / took / speed, "bandwidth": speed}
    note = f"{took * 1e6:.0f} us, {size / took / speed:.0%} of {speed / 1e12:.2f} TB/s"
    note += _beside_torch(seqs, 1, context, took)
    return Row(f"decode {policy}, {seqs} x {context}", None, note, values)


def prefill_row(policy: str, fresh: int = PREFILL[1], context: int = PREFILL[2]) -> Row:
    """Time of a chunk of prefill over what is there already."""
    took, _ = _attention(policy, 1, fresh, context)
    note = f"{took * 1e3:.2f} ms" + _beside_torch(1, fresh, context, took)
    return Row(f"prefill {policy}, {fresh} over {context}", None, note, {"seconds": took})


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
    layer = Layer("kivi-4bit", 4, ENDS_GROUP, "cuda")
    tokens, batch = layer.tokens(4, 2), layer.batch(1)
    assert (batch.stored_after > batch.stored).all()
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
    out.fill_(torch.nan)  # what is equal afterwards was written by the replay
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
