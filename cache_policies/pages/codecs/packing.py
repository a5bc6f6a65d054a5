"""Bit-packed code layouts of the min-max codecs, and min-max quantization.

A kernel names the packing that it reads (``Kernel.packing``); the page layout declares it, and the
codec follows the type of the declared field. Both packings take the same number of bytes.

``lanes``, bytes: codes are laid out for byte-wise multiply-add instructions (AVX2 ``maddubs``,
AVX-512 ``vpdpbusd``), which sum four neighbouring bytes (two, for ``maddubs``) into one lane:

* keys, per 32 tokens and 4 channels: four vectors of 8 tokens x 4 channels;
* values, per 8 channels and 16 tokens: four vectors of 8 channels x 4 tokens.

A vector is 32 bytes of codes. With ``bits`` per code, ``8 / bits`` vectors share 32 bytes:
vector ``i`` sits in bit field ``i % (8 / bits)`` of byte run ``i // (8 / bits)``. Of 3 bits the
low two are laid out as codes of 2 bits; 16 bytes with the high ones follow: that of byte ``j`` of
vector ``i`` is bit ``i + 4 (j // 16)`` of byte ``j % 16``.

``planes``, 16-bit words, for GPUs: with ``n = 16 / bits`` codes a word, bit field ``s`` of word
``[g, i, c]`` holds the code of token ``32 g + s * 32 / n + i`` and channel ``c``, so that one shift
of a tile of words gives a tile of codes, and neighbouring threads read neighbouring channels. Of 3
bits the low two are laid out as codes of 2 bits, four words; two words with the high ones follow:
bit ``s + 8 h`` of the ``i``-th is that of token ``32 g + 4 s + 2 h + i``.
"""

from __future__ import annotations

import torch

from cache_policies.errors import PolicyError
from cache_policies.pages.field import Field

BITS = (2, 4, 8)
LANES, PLANES = "lanes", "planes"
SPAN = 32  # tokens packed together
FP16_MAX = torch.finfo(torch.float16).max
_HIGH_BIT = (torch.arange(4)[:, None] + 4 * torch.arange(2)).to(torch.uint8)[..., None]
_HIGH_PLANE = (torch.arange(8)[:, None] + 8 * torch.arange(2)).int()[..., None, None]


def check_bits(name: str, bits: int, allowed: tuple[int, ...] = BITS) -> None:
    """Raise PolicyError unless ``bits`` is allowed."""
    if bits not in allowed:
        raise PolicyError(f"{name}={bits} is not one of {allowed}")


def block_shape(bits: int) -> tuple[int, int]:
    """Bytes of four vectors."""
    return (3, 16) if bits == 3 else (bits // 2, 32)


def to_half(x: torch.Tensor) -> torch.Tensor:
    """float16, with values beyond its range clamped to it rather than made infinite."""
    return x.clamp(-FP16_MAX, FP16_MAX).half()


def quantize(x: torch.Tensor, bits: int, axis: int) -> tuple[torch.Tensor, ...]:
    """Min-max quantize along ``axis``: codes (uint8), scale and minimum (float16, axis kept).

    The codes are computed from the *stored* float16 scale and minimum, so decoding adds no
    second rounding. A constant group has scale 0 and decodes to its minimum.
    """
    low, high = x.aminmax(dim=axis, keepdim=True)
    levels = 2**bits - 1
    scale = to_half((high - low) / levels)
    minimum = to_half(low)
    inverse = torch.where(scale > 0, 1.0 / scale.float(), 0.0)
    codes = ((x - minimum.float()) * inverse).round().clamp(0, levels).to(torch.uint8)
    return codes, scale, minimum


def _merge(vectors: torch.Tensor, bits: int) -> torch.Tensor:
    """``[..., 4, 8, 4]`` codes -> ``[..., *block_shape(bits)]`` bytes."""
    if bits == 3:
        low = _merge(vectors & 3, 2).unflatten(-1, (2, 16)).flatten(-3, -2)
        halves = (vectors >> 2).flatten(-2).unflatten(-1, (2, 16))
        high = (halves << _HIGH_BIT).sum((-3, -2), dtype=torch.uint8)
        return torch.cat([low, high[..., None, :]], -2)
    per_byte = 8 // bits
    split = vectors.flatten(-2).unflatten(-2, (4 // per_byte, per_byte))
    shifts = (torch.arange(per_byte) * bits).to(torch.uint8)[:, None]
    return (split << shifts).sum(-2, dtype=torch.uint8)


def _split(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of ``_merge``."""
    if bits == 3:
        low = _split(packed[..., :2, :].flatten(-2)[..., None, :], 2)
        high = (packed[..., 2:, None, :] >> _HIGH_BIT) & 1
        return low | (high.flatten(-2).unflatten(-1, (8, 4)) << 2)
    shifts = (torch.arange(8 // bits) * bits).to(torch.uint8)[:, None]
    codes = (packed[..., None, :] >> shifts) & (2**bits - 1)
    return codes.flatten(-3, -2).unflatten(-1, (8, 4))


def pack_planes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """``[heads, tokens, channels]`` -> ``[heads, tokens / 32, 2 * bits, channels]`` int16."""
    if bits == 3:
        split = (codes >> 2).int().unflatten(1, (-1, 8, 2, 2)) << _HIGH_PLANE
        return torch.cat([pack_planes(codes & 3, 2), split.sum((2, 3)).to(torch.int16)], 2)
    fields = 16 // bits
    split = codes.int().unflatten(1, (-1, fields, SPAN // fields))
    shifts = (torch.arange(fields, dtype=torch.int32) * bits)[:, None, None]
    return (split << shifts).sum(2).to(torch.int16)


def unpack_planes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of ``pack_planes``."""
    if bits == 3:
        high = (packed[:, :, None, None, 4:].int() >> _HIGH_PLANE) & 1
        return unpack_planes(packed[:, :, :4], 2) | (high.to(torch.uint8).flatten(1, 4) << 2)
    shifts = (torch.arange(16 // bits, dtype=torch.int32) * bits)[:, None, None]
    codes = (packed.int()[:, :, None] >> shifts) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(1, 3)


def key_field(packed: str, page_tokens: int, head_size: int, bits: int) -> Field:
    """Declare key codes in a packing."""
    if packed == PLANES:
        return Field("key", torch.int16, _plane_shape(page_tokens, head_size, bits))
    return Field("key", torch.uint8, (page_tokens // SPAN, head_size // 4, *block_shape(bits)))


def value_field(packed: str, page_tokens: int, head_size: int, bits: int) -> Field:
    """Declare value codes in a packing."""
    if packed == PLANES:
        return Field("value", torch.int16, _plane_shape(page_tokens, head_size, bits))
    return Field("value", torch.uint8, (head_size // 8, page_tokens // 16, *block_shape(bits)))


def _plane_shape(page_tokens: int, head_size: int, bits: int) -> tuple[int, int, int]:
    return page_tokens // SPAN, 2 * bits, head_size


def pack_keys(codes: torch.Tensor, bits: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """``[heads, tokens, channels]`` -> ``[heads, tokens / 32, channels / 4, *block_shape]``.

    As ``pack_planes`` for int16, the type of a field of planes.
    """
    if dtype == torch.int16:
        return pack_planes(codes, bits)
    spans = codes.unflatten(1, (-1, 4, 8)).unflatten(-1, (-1, 4))
    return _merge(spans.permute(0, 1, 4, 2, 3, 5), bits)


def unpack_keys(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of ``pack_keys``."""
    if packed.dtype == torch.int16:
        return unpack_planes(packed, bits)
    spans = _split(packed, bits).permute(0, 1, 3, 4, 2, 5)
    return spans.flatten(-2).flatten(1, 3)


def pack_values(codes: torch.Tensor, bits: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """``[heads, tokens, channels]`` -> ``[heads, channels / 8, tokens / 16, *block_shape]``.

    As ``pack_planes`` for int16, the type of a field of planes.
    """
    if dtype == torch.int16:
        return pack_planes(codes, bits)
    spans = codes.unflatten(1, (-1, 4, 4)).unflatten(-1, (-1, 8))
    return _merge(spans.permute(0, 4, 1, 2, 5, 3), bits)


def unpack_values(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of ``pack_values``."""
    if packed.dtype == torch.int16:
        return unpack_planes(packed, bits)
    spans = _split(packed, bits).permute(0, 2, 3, 5, 1, 4)
    return spans.flatten(-2).flatten(1, 3)
