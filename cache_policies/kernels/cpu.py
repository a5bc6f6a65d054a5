"""C++ kernels for CPUs: checks, then hands addresses to the extension module ``_cpu``.

Instruction sets are chosen at run time (AMX; AVX-512 with VNNI, with or without bfloat16;
AVX2+FMA+F16C; portable). Threads are OpenMP's: in a process that imported torch, torch's own
pool, hence vLLM's binding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cache_policies.errors import PolicyError
from cache_policies.kernels import _cpu  # type: ignore[attr-defined]  # built from src/
from cache_policies.kernels.counts import all_tokens, spans
from cache_policies.kernels.moves import disorder, move_rows
from cache_policies.pages.codecs import rotation
from cache_policies.pages.codecs.affine import AffineCodec
from cache_policies.pages.codecs.int8 import Int8
from cache_policies.pages.codecs.packing import LANES
from cache_policies.pages.codecs.plain import Raw

if TYPE_CHECKING:
    from cache_policies.kernels.contract import Batch, Mass, Reads, Shape
    from cache_policies.kernels.moves import Moves
    from cache_policies.pages.layout import PageLayout

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_PLAIN, _INT8, _AFFINE = range(3)
MAX_GROUP_HEADS = 192  # query heads of one KV head; rows of a task in src/step/task.h


def supported_isas() -> list[str]:
    """Instruction sets this CPU runs, best first."""
    return list(_cpu.supported())


class CpuKernel:
    """Attention on a CPU, without ever materializing the decoded cache.

    Args:
        layout: fields of a page.
        shape: heads and scale of the layer.
        isa: instruction set; the best supported one by default.
        rounding: decode int8 pages and those of 2 to 4 bits by integer dot products, and prefill
            over the latter in bfloat16 where the CPU is fast at it; with AMX, over other pages
            too, floats being sums of two. False: in float32, to measure what these add.
        num_threads: OpenMP threads; 0 takes the runtime's own number.

    """

    name = "cpu"
    packing = LANES

    def __init__(
        self,
        layout: PageLayout,
        shape: Shape,
        *,
        isa: str | None = None,
        rounding: bool = True,
        num_threads: int = 0,
    ) -> None:
        if shape.num_heads // shape.num_kv_heads > MAX_GROUP_HEADS:
            raise PolicyError(f"more than {MAX_GROUP_HEADS} query heads share a KV head")
        if layout.packing != self.packing:
            raise PolicyError(f"the cpu kernel reads pages packed as {self.packing} only")
        self.layout, self.shape, self.num_threads = layout, shape, num_threads
        self.isa = isa or supported_isas()[0]
        self._dtype = layout.model_dtype
        self._sinks = _sinks(shape)  # must live as long as the kernel
        self._layer = _cpu.Layer(
            self.isa,
            _layout(layout),
            _DTYPES[self._dtype],
            shape.num_heads,
            shape.num_kv_heads,
            shape.scale,
            shape.soft_cap,
            0 if self._sinks is None else self._sinks.data_ptr(),
            rounding,
            self._key_offset(),
        )

    @classmethod
    def summary(cls) -> str:
        return f"cpu ({supported_isas()[0]})"

    def attend(
        self,
        pages: torch.Tensor,
        batch: Batch,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        mass: Mass | None = None,
        reads: Reads | None = None,
    ) -> None:
        self._set(pages, batch)
        kept_alive = self._set_options(batch, mass, reads)
        self._check_fresh(batch, query, key, value)
        heads = self.shape.num_heads
        self._layer.attend(
            *self._rows("query", query, heads),
            *self._rows("key", key, self.shape.num_kv_heads),
            *self._rows("value", value, self.shape.num_kv_heads),
            *self._rows("output", output, heads),
            self.num_threads,
        )
        del kept_alive

    def page_mass(
        self,
        pages: torch.Tensor,
        batch: Batch,
        query: torch.Tensor,
        key: torch.Tensor,
        blocks: torch.Tensor,
        samples: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._set(pages, batch)
        _require(blocks.dtype == torch.int32 and blocks.is_contiguous(), "blocks: int32")
        _require(samples > 0, "at least one sample")
        heads = self.shape.num_kv_heads
        most = -(-int(batch.stored.max()) // self.layout.page_tokens)
        rest = torch.zeros(len(blocks), heads, dtype=torch.float32)
        mass = rest.new_zeros(*rest.shape, most)
        self._layer.page_mass(
            *self._rows("query", query, self.shape.num_heads),
            *self._rows("key", key, heads),
            *(blocks.data_ptr(), len(blocks), samples),
            *(mass.data_ptr(), rest.data_ptr(), most),
            self.num_threads,
        )
        return mass, rest

    def append(
        self, pages: torch.Tensor, batch: Batch, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        self._set(pages, batch)
        self._check_fresh(batch, key, value)
        self._layer.append(
            *self._rows("key", key, self.shape.num_kv_heads),
            *self._rows("value", value, self.shape.num_kv_heads),
            self.num_threads,
        )

    def read(
        self,
        pages: torch.Tensor,
        batch: Batch,
        key: torch.Tensor,
        value: torch.Tensor,
        index: torch.Tensor | None = None,
        start: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._set(pages, batch)
        self._check_fresh(batch, key, value)
        if index is None:
            numbers, start = all_tokens(batch.host)
            index = numbers.expand(self.shape.num_kv_heads, -1).contiguous()
        fresh = batch.query_start[1:] - batch.query_start[:-1] - batch.appended
        start = self._check_index(batch, index, start, batch.stored + batch.ring + fresh)
        out = torch.empty(2, *index.shape, self.layout.head_size, dtype=torch.float32)
        self._layer.read(
            *self._rows("key", key, self.shape.num_kv_heads),
            *self._rows("value", value, self.shape.num_kv_heads),
            index.data_ptr(),
            start.data_ptr(),
            index.shape[1],
            out[0].data_ptr(),
            out[1].data_ptr(),
            self.num_threads,
        )
        return out[0], out[1]

    def write(
        self,
        pages: torch.Tensor,
        batch: Batch,
        index: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        start: torch.Tensor | None = None,
    ) -> None:
        self._set(pages, batch)
        start = self._check_index(batch, index, start, batch.stored + batch.ring)
        wanted = (*index.shape, self.layout.head_size)
        for x in (key, value):
            _require(x.dtype == torch.float32 and x.is_contiguous(), "write takes float32")
            _require(x.shape == wanted, f"write: shape {tuple(x.shape)} is not {wanted}")
        if self.layout.codec.groups_tokens:
            self._check_order(index, start, batch)
        self._layer.write(
            index.data_ptr(), start.data_ptr(), index.shape[1], key.data_ptr(), value.data_ptr(),
            self.num_threads,
        )  # fmt: skip

    def move(
        self, pages: torch.Tensor, key: torch.Tensor, value: torch.Tensor, moves: Moves
    ) -> None:
        if not self.layout.codec.groups_tokens:
            move_rows(self, pages, key, value, moves)
            return
        source, target, index, number = moves.source, moves.target, moves.index, moves.number
        self._check_fresh(source, key, value)
        fresh = source.query_start.diff() - source.appended
        self._check_index(source, number, moves.start, source.stored + source.ring + fresh)
        start = self._check_index(target, index, moves.start, target.stored + target.ring)
        self._check_order(index, start, target)
        wrong = moves.wrong(self.layout.page_tokens)
        _require(not wrong, wrong)
        self._set(pages, source)
        self._layer.set_source()
        self._set(pages, target)
        self._layer.move(
            *self._rows("key", key, self.shape.num_kv_heads),
            *self._rows("value", value, self.shape.num_kv_heads),
            index.data_ptr(), number.data_ptr(), start.data_ptr(), index.shape[1], self.num_threads,
        )  # fmt: skip

    def _key_offset(self) -> int:
        offset = self.shape.key_offset  # lives as long as the kernel does
        if offset is None:
            return 0
        wanted = (self.shape.num_kv_heads, self.layout.head_size)
        _require(offset.dtype == torch.float32 and offset.is_contiguous(), "key_offset: float32")
        _require(offset.shape == wanted, f"key_offset: shape {tuple(offset.shape)}, not {wanted}")
        return int(offset.data_ptr())

    def _check_order(self, index: torch.Tensor, start: torch.Tensor, batch: Batch) -> None:
        wrong = disorder(index, start, batch, self.layout.page_tokens)
        _require(not wrong, wrong)

    def _check_index(
        self, batch: Batch, index: torch.Tensor, start: torch.Tensor | None, held: torch.Tensor
    ) -> torch.Tensor:
        """``start`` as a tensor, once every number of ``index`` is known to be below ``held``."""
        _require(index.dtype == torch.int32 and index.is_contiguous(), "index: int32")
        _require(index.shape[0] == self.shape.num_kv_heads, f"index: {tuple(index.shape)}")
        ends = torch.tensor(spans(batch.host, index.shape[1], start), dtype=torch.int32)
        most = held.repeat_interleave(ends.diff())
        _require(bool((index < most).all()), "index beyond the held tokens")
        return ends

    def _check_fresh(self, batch: Batch, *tensors: torch.Tensor) -> None:
        needed = batch.host.query_start[-1]
        _require(all(len(x) >= needed for x in tensors), f"fewer than {needed} fresh tokens")

    def _set_options(
        self, batch: Batch, mass: Mass | None, reads: Reads | None
    ) -> list[torch.Tensor]:
        """Pass the addresses on; returns what must live until the call is over."""
        addresses, kept = [0] * 10, []
        if mass is not None:
            held = batch.stored + batch.ring + batch.query_start[1:] - batch.query_start[:-1]
            out, kept = mass.out, [mass.first_query, mass.first_token, mass.place]
            _require(out.dtype == torch.float32 and out.stride(1) == 1, "mass: float32")
            _require(out.shape[0] == self.shape.num_kv_heads, "mass: heads")
            _require(all(x.dtype == torch.int32 for x in kept), "mass: int32")
            _require(all(len(x) == batch.num_seqs for x in kept), "mass: requests")
            fits = (mass.place < 0) | (mass.place + held <= out.shape[1])
            _require(bool(fits.all()), "mass: fewer places than tokens")
            kept = [x.contiguous() for x in kept]
            addresses[:5] = [*(x.data_ptr() for x in kept), out.data_ptr(), out.stride(0)]
        if reads is not None:
            _require(reads.pages.dtype == torch.int32 and reads.pages.is_contiguous(), "reads")
            _require(reads.count.dtype == torch.int32 and reads.count.is_contiguous(), "reads")
            _require(reads.first.dtype == torch.int32, "reads: int32")
            _require(len(reads.first) == batch.num_seqs, "reads: a first list per request")
            lists = [x.data_ptr() for x in (reads.pages, reads.count, reads.first)]
            addresses[5:] = [*lists, reads.pages.shape[2], reads.block]
        self._layer.set_options(*addresses)
        return kept

    def _set(self, pages: torch.Tensor, batch: Batch) -> None:
        _require(pages.dtype == torch.uint8 and pages.stride(-1) == 1, "pages must be bytes")
        _require(pages.shape[1:] == (self.shape.num_kv_heads, self.layout.head_bytes), "page shape")
        table = batch.block_table
        _require(table.dtype == torch.int32 and table.stride(-1) == 1, "block_table must be int32")
        counts, slots = batch.counts, batch.slots
        _require(all(c.dtype == torch.int32 and c.is_contiguous() for c in counts), "counts: int32")
        self._layer.set_pages(pages.data_ptr(), pages.stride(0), pages.stride(1))
        if slots is not None:
            wanted = (batch.num_seqs, self.shape.num_kv_heads)
            _require(slots.dtype == torch.int32 and slots.is_contiguous(), "slots must be int32")
            _require(slots.shape[:2] == wanted, f"slots: {tuple(slots.shape)} is not {wanted}")
        self._layer.set_batch(
            batch.num_seqs, *(c.data_ptr() for c in counts), table.data_ptr(), table.stride(0),
            *((0, 0) if slots is None else (slots.data_ptr(), slots.shape[2])),
        )  # fmt: skip

    def _rows(self, name: str, x: torch.Tensor, heads: int) -> tuple[int, int]:
        head_size = self.layout.head_size
        _require(x.dtype == self._dtype, f"{name} must be {self._dtype}, not {x.dtype}")
        _require(x.shape[1:] == (heads, head_size), f"{name} has shape {tuple(x.shape)}")
        _require(x.stride(2) == 1 and x.stride(1) == head_size, f"{name}: heads not contiguous")
        return x.data_ptr(), x.stride(0)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"cpu kernel: {message}")


def _group(codec: AffineCodec, head_size: int) -> int:
    return codec.divisor if codec.keys_per_channel else codec.channel_group(head_size)


def _sinks(shape: Shape) -> torch.Tensor | None:
    if shape.sinks is None:
        return None
    sinks = shape.sinks.detach().to(torch.float32).contiguous()
    _require(sinks.shape == (shape.num_heads,), f"sinks have shape {tuple(sinks.shape)}")
    return sinks


def _layout(layout: PageLayout) -> object:
    codec = layout.codec
    affine = codec if isinstance(codec, AffineCodec) else None
    kinds = ((Raw, _PLAIN), (Int8, _INT8), (AffineCodec, _AFFINE))
    kind = next((kind for cls, kind in kinds if isinstance(codec, cls)), None)
    if kind is None:
        raise PolicyError(f"the cpu kernel does not know the codec {codec}")
    store = codec.dtype(layout.model_dtype) if isinstance(codec, Raw) else layout.model_dtype
    offsets = {
        name: layout.offsets.get(name, -1)
        for name in ("key", "key_scale", "key_min", "value", "value_scale", "value_min")
    }
    return _cpu.layout(
        kind=kind,
        store_dtype=_DTYPES[store],
        ring_dtype=_DTYPES[layout.ring_dtype],
        head_size=layout.head_size,
        page_tokens=layout.page_tokens,
        ring_tokens=layout.ring_tokens,
        ring_pages=layout.ring_pages,
        k_bits=affine.key_bits if affine else 0,
        v_bits=affine.value_bits if affine else 0,
        group=_group(affine, layout.head_size) if affine else 1,
        rotation=rotation.block(layout.head_size) if codec.ROTATES else 0,
        keys_per_channel=affine.keys_per_channel if affine else False,
        run_bytes=layout.head_bytes,
        **offsets,
    )
