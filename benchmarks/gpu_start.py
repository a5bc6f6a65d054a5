"""What a worker compiles as it starts, on a GPU: seconds, memory, and whether steps add to it."""

from __future__ import annotations

import time
from dataclasses import replace
from tempfile import TemporaryDirectory

import torch
from triton import knobs
from triton.runtime import driver

from benchmarks.gpu_machine import Row
from benchmarks.gpu_timing import LLAMA, Layer
from cache_policies.kernels.contract import Mass, Reads
from cache_policies.kernels.triton.warm import launches, warm_up
from cache_policies.pages.codecs.packing import PLANES
from tests.kernels.harness import Setup

SAMPLES, CONTEXT = 8, 1000
FRESH = [1, 256]  # a request that decodes, and a prompt


def start_row(device: str, policy: str = "kivi-4bit") -> Row:
    """Compile and load a layer's kernels, none of which was kept, then launch them all.

    The first thing a process does: what is loaded already would cost nothing here.

    Args:
        device: ``cuda``; or ``cpu``, with a stand-in for Triton's driver.
        policy: a codec.

    """
    setup = Setup.make(policy, dtype=torch.bfloat16, packing=PLANES, **LLAMA)  # type: ignore[arg-type]
    functions = {call.function for call in launches(setup.layout, setup.shape, [SAMPLES])}
    free, begin = _free(device), time.perf_counter()
    with TemporaryDirectory() as empty, knobs.cache.scope():
        knobs.cache.dir = empty
        count = warm_up([(setup.layout, setup.shape)], [SAMPLES])
    took, held = time.perf_counter() - begin, free - _free(device)
    number = driver.active.get_current_device()
    ready = sum(len(f.device_caches[number][0]) for f in functions)
    _steps(Layer(policy, len(FRESH), CONTEXT, device))
    added = sum(len(f.device_caches[number][0]) for f in functions) - ready
    note = f"{count} in {took:.1f} s, {held / 2**20:.0f} MiB; {added} more in the steps after it"
    values = {"kernels": count, "seconds": took, "bytes": held, "added": added}
    return Row(f"kernels compiled at start, {policy}", count > 0 and not added, note, values)


def _free(device: str) -> int:
    """Bytes of the device's memory that are free."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else 0


def _steps(layer: Layer) -> None:
    """Whatever methods may ask of a layer."""
    setup, kernel, pages = layer.setup, layer.kernel, layer.pages
    heads, table = setup.shape.num_kv_heads, setup.block_table
    whole = {"dtype": torch.int32, "device": table.device}
    batch, tokens = setup.batch([CONTEXT] * 2, FRESH), layer.tokens(sum(FRESH), 2)
    own = torch.arange(table.shape[1] * heads, **whole).view(-1, heads)  # each head its own place
    mapped = replace(batch, slots=own.T.repeat(2, 1, 1))
    most, none = CONTEXT + max(FRESH), torch.zeros(2, dtype=torch.int32)
    mass = Mass(none, none, none, torch.zeros(heads, most, device=table.device))
    lists = torch.zeros(3, heads, 1, **whole), torch.ones(3, heads, **whole)
    reads = Reads(*lists, torch.arange(2, **whole))
    sparse = replace(reads, block=128)
    for options in ((), (mass, None)):
        kernel.attend(pages, batch, *tokens, torch.empty_like(tokens[0]), *options)
    for there in (batch, mapped):
        for options in ((None, reads), (mass, reads), (mass, sparse)):
            kernel.attend(pages, there, *tokens, torch.empty_like(tokens[0]), *options)
        block = torch.tensor([[1, 0, 128]], dtype=torch.int32)
        kernel.page_mass(pages, there, *tokens[:2], block, SAMPLES)
        kernel.append(pages, there, *tokens[1:])
        after = there.after_append()
        held = [CONTEXT + fresh for fresh in FRESH]
        start = torch.tensor([0, *held]).cumsum(0).int()
        index = torch.cat([torch.arange(n, **whole) for n in held]).repeat(heads, 1)
        key, value = kernel.read(pages, after, *tokens[1:], index, start)
        kernel.write(pages, after, index, key, value, start)
