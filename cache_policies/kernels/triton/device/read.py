"""Decode single tokens of one request to float32."""

import triton
import triton.language as tl

from cache_policies.kernels.triton.device.launched import launched
from cache_policies.kernels.triton.device.place import request_of, run_at
from cache_policies.kernels.triton.device.source import pending


@triton.jit
def code(base, token, c, real, FIELD: tl.constexpr, BITS: tl.constexpr, PAGE: tl.constexpr):
    """Codes ``[tokens, channels]`` as float32."""
    FIELDS: tl.constexpr = 2 if BITS == 3 else BITS
    ROWS: tl.constexpr = 2 * FIELDS
    span = (base + FIELD).to(tl.pointer_type(tl.uint16))
    span += token // 32 * (2 * BITS * PAGE.head_size)
    x = field_of(span, token % ROWS, token % 32 // ROWS * FIELDS, c, real, FIELDS, PAGE)
    if BITS == 3:
        x |= (
            field_of(span, 4 + token % 2, token % 32 // 4 + token % 4 // 2 * 8, c, real, 1, PAGE)
            << 2
        )
    return x.to(tl.float32)


@triton.jit
def field_of(span, row, shift, c, real, BITS: tl.constexpr, PAGE: tl.constexpr):
    """Bit fields of words ``row`` of each token's span."""
    at = span[:, None] + (row[:, None] * PAGE.head_size + c[None, :])
    words = tl.load(at, mask=real, other=0).to(tl.int32)
    return (words >> shift[:, None]) & ((1 << BITS) - 1)


@triton.jit
def scaled(base, x, token, c, real, SCALE: tl.constexpr, LOW: tl.constexpr,
           BY_CHANNEL: tl.constexpr, PAGE: tl.constexpr):  # fmt: skip
    """``x * scale + minimum``."""
    if BY_CHANNEL:
        at = (token // PAGE.group * PAGE.head_size)[:, None] + c[None, :]
    else:
        at = (c // PAGE.group * PAGE.tokens)[None, :] + token[:, None]
    pointer = base.to(tl.pointer_type(tl.float16))[:, None] + at
    scale = tl.load(pointer + SCALE // 2, mask=real, other=0.0).to(tl.float32)
    return x * scale + tl.load(pointer + LOW // 2, mask=real, other=0.0).to(tl.float32)


@triton.jit
def plain(base, at, real, FIELD: tl.constexpr, PAGE: tl.constexpr):
    """Numbers, or int8 codes, as float32."""
    pointer = (base + FIELD).to(tl.pointer_type(PAGE.stored))[:, None] + at
    return tl.load(pointer, mask=real, other=0).to(tl.float32)


@triton.jit
def decoded(base, token, c, real, valid, PAGE: tl.constexpr):
    """Keys and values of store tokens, each in a page of its own."""
    if PAGE.kind == "codes":
        k = code(base, token, c, real, PAGE.key_at, PAGE.key_bits, PAGE)
        k = scaled(base, k, token, c, real, PAGE.key_scale, PAGE.key_min, PAGE.by_channel, PAGE)
        v = code(base, token, c, real, PAGE.value_at, PAGE.value_bits, PAGE)
        v = scaled(base, v, token, c, real, PAGE.value_scale, PAGE.value_min, False, PAGE)
    else:
        octet = (token // 8 * (8 * PAGE.head_size) + token % 8)[:, None] + c[None, :] * 8
        k = plain(base, octet, real, PAGE.key_at, PAGE)
        v = plain(base, token[:, None] * PAGE.head_size + c[None, :], real, PAGE.value_at, PAGE)
        if PAGE.kind == "int8":
            at = base.to(tl.pointer_type(tl.float16)) + token
            k *= tl.load(at + PAGE.key_scale // 2, mask=valid, other=0.0).to(tl.float32)[:, None]
            v *= tl.load(at + PAGE.value_scale // 2, mask=valid, other=0.0).to(tl.float32)[:, None]
    return k, v


@launched
def read(
    index, key, value, out_key, out_value, stored, ring, start, count, head_rows, pages, row,
    slots, store_row, slots_stride, key_stride, value_stride,
    page_stride: tl.int64, head_stride: tl.int64,
    PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``BLOCK`` of the numbered tokens, counted through store, ring and fresh ones; 0 below 0."""
    head, c = tl.program_id(1), tl.arange(0, PAGE.width)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < count
    number = tl.load(index + head * head_rows + i, mask=live, other=-1)
    channel = (c < PAGE.head_size)[None, :]
    far = (number >= 0) & (number < stored)
    request = request_of(
        pages, row, 0, slots, slots_stride, 0, head, page_stride, head_stride, PAGE
    )
    index = tl.where(far, store_row + number // PAGE.tokens, 0)  # row[0] is there
    base = run_at(request, index, PAGE)
    k, v = decoded(base, number % PAGE.tokens, c, far[:, None] & channel, far, PAGE)
    near = live & (number >= stored)
    k_near, v_near = pending(request, key, value, key_stride, value_stride, start, ring,
                             number - stored, c, near, PAGE)  # fmt: skip
    at = (head * head_rows + i).to(tl.int64)[:, None] * PAGE.head_size + c[None, :]
    real = live[:, None] & channel
    tl.store(out_key + at, tl.where(near[:, None], k_near, k), mask=real)
    tl.store(out_value + at, tl.where(near[:, None], v_near, v), mask=real)
