"""Compile what layers launch before the first request comes, and load it onto the GPU.

Launches are recorded over tensors without memory. Triton compiles a kernel for the types of its
arguments, and for which of them 16 divides: all that an engine hands over but ``VARYING`` (see
``device/launched.py``) it divides, for heads have 64 channels or more and pages lie at 64 bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from triton.runtime.errors import OutOfResources

from cache_policies.errors import PolicyError
from cache_policies.kernels.contract import Batch, Mass, Reads
from cache_policies.kernels.triton.kernel import TritonKernel
from cache_policies.kernels.triton.launch import recorded
from cache_policies.kernels.triton.page import Page, interpreting
from cache_policies.pages.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from cache_policies.kernels.contract import Shape
    from cache_policies.kernels.triton.launch import Launch
    from cache_policies.pages.layout import PageLayout

META = torch.device("meta")
LARGE = 1 << 31  # bytes; AMD's compiler tells a tensor that has more, as an engine's pages, by it

_ready: set[tuple[Any, ...]] = set()  # what this process has compiled already


def warm_up(layers: Iterable[tuple[PageLayout, Shape]], samples: Collection[int] | None) -> int:
    """Compile and load every kernel of some layers; layers that are alike have the same ones.

    Nothing is launched and no memory but the kernels' own is taken on the GPU. In Triton's
    interpreter, which compiles nothing, nothing is done.

    Args:
        layers: pages and heads of each layer.
        samples: of the sparse prefills that requests may choose (``Kernel.page_mass``), beside all
            other methods; None: no request may choose a method.

    Returns:
        how many kernels these are; 0 where all layers were ready before.

    Raises:
        PolicyError: one does not compile, or the GPU cannot take it.

    """
    if interpreting():
        return 0
    made = set()
    for layout, shape in layers:
        kind = _kind(layout, shape, samples)
        if kind not in _ready:
            made |= {_loaded(call, layout, shape) for call in launches(layout, shape, samples)}
            _ready.add(kind)
    return len(made)


def launches(layout: PageLayout, shape: Shape, samples: Collection[int] | None) -> list[Launch]:
    """Whatever a layer may launch, each kernel at least once; arguments as for ``warm_up``."""
    kernel, step = TritonKernel(layout, shape), Rehearsal(layout, shape)
    with recorded() as calls:
        step.attend(kernel, step.batch)
        kernel.append(step.pages, step.batch, step.key, step.value)
        if samples is not None:
            step.attend(kernel, step.batch, counted=True)
            for batch in (step.batch, step.mapped):
                step.read_chosen(kernel, batch)
                step.cut(kernel, batch)
                step.compare(kernel, batch, samples)
            kernel.append(step.pages, step.mapped, step.key, step.value)
    return calls


class Rehearsal:
    """A request that decodes and a prompt, over tensors without memory.

    Args:
        layout: of the layer's pages.
        shape: of the layer.

    """

    def __init__(self, layout: PageLayout, shape: Shape) -> None:
        size, heads = layout.page_tokens, shape.num_kv_heads
        fresh = np.array([1, 2 * size], dtype=np.int32)  # more than a ring takes
        before = np.full(2, 2 * size + 1, dtype=np.int32)  # store, and ring where there is one
        start = np.concatenate([[0], fresh.cumsum()]).astype(np.int32)
        self.heads, self.held = heads, before + fresh
        count = LARGE // (heads * layout.head_bytes) + 1
        self.pages = _empty(count, heads, layout.head_bytes, dtype=torch.uint8)
        self.batch = Batch.of(Plan.of(layout), start, before, _int32(2, 8))
        # Heads own unequal numbers of pages only where lists say which; see ``Slots``.
        self.mapped = self.batch.with_slots(_int32(2, heads, 8))
        wide = (shape.num_heads, heads, heads)
        size, dtype = layout.head_size, layout.model_dtype
        self.query, *both = (_empty(int(start[-1]), h, size, dtype=dtype) for h in wide)
        self.key, self.value = both

    def attend(
        self, kernel: TritonKernel, batch: Batch, reads: Reads | None = None, *,
        counted: bool = False,
    ) -> None:  # fmt: skip
        """Attend to all pages or those of the lists; ``counted``: and count the mass."""
        none, out = torch.zeros(2, dtype=torch.int32), _empty(self.heads, int(self.held.max()))
        mass = Mass(none, none, none, out) if counted else None
        output = torch.empty_like(self.query)
        kernel.attend(self.pages, batch, self.query, self.key, self.value, output, mass, reads)

    def read_chosen(self, kernel: TritonKernel, batch: Batch) -> None:
        """Attend by a list a request, counted and not, and by lists of blocks of queries."""
        lists = _int32(2, self.heads, 2), _int32(2, self.heads), _int32(2)
        for counted in (False, True):
            self.attend(kernel, batch, Reads(*lists), counted=counted)
        blocks = Reads(*lists, kernel.tiles.many_rows)
        self.attend(kernel, batch, blocks, counted=True)

    def cut(self, kernel: TritonKernel, batch: Batch) -> None:
        """Read and write all tokens, as a cut does when they are appended."""
        start = torch.from_numpy(np.concatenate([[0], self.held.cumsum()]).astype(np.int32))
        index, after = _int32(self.heads, int(start[-1])), batch.after_append()
        key, value = kernel.read(self.pages, after, self.key, self.value, index, start)
        kernel.write(self.pages, after, index, key, value, start)

    def compare(self, kernel: TritonKernel, batch: Batch, samples: Collection[int]) -> None:
        """Compare so many queries of a block with every key."""
        block = torch.tensor([[1, 0, int(batch.host.appended[1])]], dtype=torch.int32)
        for count in samples:
            kernel.page_mass(self.pages, batch, self.query, self.key, block, count)


def _kind(layout: PageLayout, shape: Shape, samples: Collection[int] | None) -> tuple[Any, ...]:
    """What the kernels of a layer follow from; the layout names its types."""
    sinks = None if shape.sinks is None else shape.sinks.dtype
    asked = None if samples is None else frozenset(samples)
    return layout, Page.of(layout, shape), sinks, shape.key_offset is None, asked


def _loaded(call: Launch, layout: PageLayout, shape: Shape) -> Any:
    """The compiled kernel of a launch, on the GPU."""
    try:
        kernel = _fitting(call)
        if kernel.n_spills and call.note_spills():
            kernel = _made(call)
    except Exception as error:  # compiler, assembler, loader and driver have no type in common
        *_, why = [type(error).__name__, *str(error).strip().split("\n")]
        raise PolicyError(
            f"the Triton kernel {call.function.__name__} cannot run for {layout.codec} at head "
            f"size {layout.head_size} ({shape.num_heads} query heads over {shape.num_kv_heads} KV "
            f"heads, {layout.model_dtype}) on {torch.cuda.get_device_name()}: {why}; choose "
            "another codec in --cache-policy, or drop it"
        ) from error
    return kernel


def _fitting(call: Launch) -> Any:
    """Made with fewer stages where the GPU's shared memory is too small for them."""
    try:
        return _made(call)
    except OutOfResources:
        if not call.note_size():
            raise
        return _made(call)


def _made(call: Launch) -> Any:
    """Compiled as it will be launched, and loaded."""
    call = call.here()
    options = call.constants | call.options
    kernel = call.function.warmup(*call.arguments, grid=call.grid, **options)
    _ = kernel[call.grid]  # loads it, or says what the GPU has too little of, every time
    return kernel


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def _int32(*shape: int) -> torch.Tensor:
    return _empty(*shape, dtype=torch.int32)
