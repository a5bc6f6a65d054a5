"""What a device function knows of pages at compile time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from cache_policies.errors import PolicyError
from cache_policies.pages.codecs.affine import AffineCodec
from cache_policies.pages.codecs.flexgen import FlexGen
from cache_policies.pages.codecs.int8 import Int8
from cache_policies.pages.codecs.kivi import Kivi
from cache_policies.pages.codecs.packing import PLANES
from cache_policies.pages.codecs.plain import Raw
from cache_policies.pages.codecs.rotated import Rotated
from cache_policies.pages.codecs.rotation import block

if TYPE_CHECKING:
    from cache_policies.kernels.contract import Shape
    from cache_policies.pages.layout import PageLayout

LOG2_E = 1.4426950408889634  # scores are powers of two
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
CODES, INT8, PLAIN = "codes", "int8", "plain"
HIDES = triton.__version__.startswith("3.7.")  # see ``device.codes.kept_apart``


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter (``TRITON_INTERPRET=1``)."""
    return bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Page:
    """A page layout, heads and types; one specialization of each kernel.

    Attributes:
        kind: ``codes`` (bit fields), ``int8`` or ``plain`` numbers.
        heads: query heads.
        kv_heads: key/value heads.
        head_size: channels.
        tokens: tokens of a page.
        key_at: byte offset of the keys; so ``value_at``.
        key_scale: byte offset of a field of scales; so the other three.
        key_bits: of a code; so ``value_bits``.
        group: tokens or channels that share a scale.
        by_channel: whether key scales belong to channels.
        ring_tokens: ring tokens in a page.
        stored: type of plain numbers or int8.
        ring: type of the ring.
        dot: type of dot products over the store; float16 for codes, which it holds exactly.
        recent: type of dot products over ring and fresh tokens.
        precision: of dot products of float32.
        cap: soft cap on scores in base 2, 0 for none.
        sinks: whether query heads have learned sinks.
        rotation: channels that the codec's rotation mixes, a power of two; 0: it has none.
        mapped: whether a slot map says whose place of a row the bytes of a head are in.
        hides: what decodes hidden from a pass of Triton's: ``both`` keys and values, ``values``, or
            nothing; see ``device.codes.kept_apart``.

    """

    kind: str
    heads: int
    kv_heads: int
    head_size: int
    tokens: int
    key_at: int
    value_at: int
    key_scale: int
    key_min: int
    value_scale: int
    value_min: int
    key_bits: int
    value_bits: int
    group: int
    by_channel: bool
    ring_tokens: int
    stored: Any
    ring: Any
    dot: Any
    recent: Any
    precision: str
    cap: float
    sinks: bool
    rotation: int
    mapped: bool
    hides: str

    @property
    def width(self) -> int:
        """Channels of a tile: a power of two."""
        return int(triton.next_power_of_2(self.head_size))

    @property
    def streams(self) -> int:
        """Parts in which a tile of codes is decoded; see ``device.codes``.

        With eight of them, matrix products of 16 tokens are too small for four warps.
        """
        return min(4, 16 // min(self.key_bits, self.value_bits)) if self.kind == CODES else 1

    @property
    def rotation_stages(self) -> int:
        """Stages of sums and differences."""
        return self.rotation.bit_length() - 1

    @property
    def rotation_scale(self) -> float:
        """Factor that makes the rotation orthonormal."""
        return float(self.rotation**-0.5)

    @classmethod
    def of(cls, layout: PageLayout, shape: Shape) -> Page:
        """The page of a layer.

        Raises:
            PolicyError: the pages are packed for another kernel, or the codec is unknown.

        """
        if layout.packing != PLANES:
            raise PolicyError(f"the triton kernel reads pages packed as {PLANES} only")
        codec, model = layout.codec, layout.model_dtype
        affine = codec if isinstance(codec, AffineCodec) else None
        scales = ("key_scale", "key_min", "value_scale", "value_min")
        kind, stored = _kind(layout)
        return cls(
            kind=kind,
            heads=shape.num_heads,
            kv_heads=shape.num_kv_heads,
            head_size=layout.head_size,
            tokens=layout.page_tokens,
            key_at=layout.offsets["key"],
            value_at=layout.offsets["value"],
            **{name: layout.offsets.get(name, 0) for name in scales},
            key_bits=affine.key_bits if affine else 8,
            value_bits=affine.value_bits if affine else 8,
            group=_group(affine, layout.head_size),
            by_channel=affine is not None and affine.keys_per_channel,
            ring_tokens=layout.ring_tokens,
            stored=stored,
            ring=TYPES[layout.ring_dtype],
            dot=_dot(stored) if kind == PLAIN else tl.float16,
            recent=_dot(TYPES[model]),
            precision="tf32x3",
            cap=shape.soft_cap * LOG2_E,
            sinks=shape.sinks is not None,
            rotation=block(layout.head_size) if codec.ROTATES else 0,
            mapped=False,
            hides="both" if HIDES and kind == CODES and not interpreting() else "",
        )


def _group(codec: AffineCodec | None, head_size: int) -> int:
    if codec is None:
        return 1
    return codec.divisor if codec.keys_per_channel else codec.channel_group(head_size)


def _kind(layout: PageLayout) -> tuple[str, Any]:
    codec = layout.codec
    if isinstance(codec, (FlexGen, Kivi, Rotated)):
        return CODES, tl.uint16
    if isinstance(codec, Int8):
        return INT8, tl.int8
    if isinstance(codec, Raw):
        return PLAIN, TYPES[codec.dtype(layout.model_dtype)]
    raise PolicyError(
        f"the triton kernel does not know the codec {codec}; it knows raw, fp16, bf16, int8, "
        "flexgen-4bit, kivi and rotated"
    )


def _dot(stored: Any) -> Any:
    """Type of dot products; the interpreter has no arithmetic in bfloat16."""
    return tl.float32 if stored == tl.bfloat16 and interpreting() else stored
