"""Encode tokens into store pages, byte for byte as ``Codec.write`` does.

A program owns a span of tokens (32, or a group of KIVI's), some channels and one head, so words
that several tokens share are written by one program. Compiled without fused multiply-add, which
would round once where the codec rounds twice.
"""

import triton
import triton.language as tl

from cache_policies.kernels.triton.device.launched import launched
from cache_policies.kernels.triton.device.place import request_of, run_at, store_of
from cache_policies.kernels.triton.device.recent import ring_place
from cache_policies.kernels.triton.device.source import numbered, pending
from cache_policies.kernels.triton.device.types import (
    divided,
    inverse_of,
    narrow,
    round_even,
    to_half,
)


@triton.jit
def quantize(x, AXIS: tl.constexpr, BITS: tl.constexpr):
    """Codes (float32), scale and minimum (float16, AXIS kept), as ``packing.quantize``."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    lowest, highest = tl.min(x, AXIS, keep_dims=True), tl.max(x, AXIS, keep_dims=True)
    scale = to_half(divided(highest - lowest, LEVELS))
    low = to_half(lowest)
    codes = round_even((x - low.to(tl.float32)) * inverse_of(scale))
    return tl.clamp(codes, 0.0, LEVELS * 1.0), scale, low


@triton.jit
def put_words(base, codes, first, c, given, BITS: tl.constexpr, SPAN: tl.constexpr,
              WIDTH: tl.constexpr, PAGE: tl.constexpr):  # fmt: skip
    """Write codes ``[SPAN, WIDTH]`` of the given tokens into their words; keep the other codes."""
    COUNT: tl.constexpr = SPAN // 32
    span = first // 32 + tl.arange(0, COUNT)
    at = base.to(tl.pointer_type(tl.uint16)) + span[:, None, None] * (2 * BITS * PAGE.head_size)
    at += c[None, None, :]
    code, given = codes.to(tl.int32), given.to(tl.int32)[:, None]
    if BITS == 3:
        shift = tl.arange(0, 8)[:, None] + tl.arange(0, 2)[None, :] * 8
        put_fields(at, code & 3, given, tl.arange(0, 8) * 2, 2, COUNT, 8, 4, WIDTH, PAGE)
        put_fields(
            at + 4 * PAGE.head_size,
            code >> 2,
            given,
            tl.reshape(shift, (16,)),
            1,
            COUNT,
            16,
            2,
            WIDTH,
            PAGE,
        )
    else:
        FIELDS: tl.constexpr = 16 // BITS
        put_fields(
            at, code, given, tl.arange(0, FIELDS) * BITS, BITS, COUNT, FIELDS, 2 * BITS, WIDTH, PAGE
        )


@triton.jit
def put_fields(at, code, given, shift, BITS: tl.constexpr, COUNT: tl.constexpr,
               FIELDS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
               PAGE: tl.constexpr):  # fmt: skip
    """Write codes of ``COUNT`` spans into the ``FIELDS`` bit fields of ``ROWS`` words each."""
    mask = given * ((1 << BITS) - 1)
    shift = tl.reshape(shift, (1, FIELDS, 1, 1))
    code = tl.sum(tl.reshape(code & mask, (COUNT, FIELDS, ROWS, WIDTH)) << shift, 1)
    mask = tl.sum(tl.reshape(mask, (COUNT, FIELDS, ROWS, 1)) << shift, 1)
    at += tl.arange(0, ROWS)[None, :, None] * PAGE.head_size
    old = tl.load(at).to(tl.int32)
    tl.store(at, ((old & ~mask) | code).to(tl.uint16))


@triton.jit
def put_by_token(base, x, token, c, given, BITS: tl.constexpr, SCALE: tl.constexpr,
                 LOW: tl.constexpr, SPAN: tl.constexpr, WIDTH: tl.constexpr,
                 PAGE: tl.constexpr):  # fmt: skip
    """Quantize over groups of channels; write scales and minima, and return the codes."""
    COUNT: tl.constexpr = WIDTH // PAGE.group
    codes, scale, low = quantize(tl.reshape(x, (SPAN, COUNT, WIDTH // COUNT)), 2, BITS)
    group = tl.min(c, 0) // PAGE.group + tl.arange(0, COUNT)
    at = base.to(tl.pointer_type(tl.float16)) + (group[None, :] * PAGE.tokens + token[:, None])
    real = given[:, None] & (group[None, :] >= 0)
    tl.store(at + SCALE // 2, tl.reshape(scale, (SPAN, COUNT)), mask=real)
    tl.store(at + LOW // 2, tl.reshape(low, (SPAN, COUNT)), mask=real)
    return tl.reshape(codes, (SPAN, WIDTH))


@triton.jit
def put_by_channel(base, x, first, c, BITS: tl.constexpr, SPAN: tl.constexpr,
                   WIDTH: tl.constexpr, PAGE: tl.constexpr):  # fmt: skip
    """Quantize keys over groups of tokens; write scales and minima, and return the codes."""
    COUNT: tl.constexpr = SPAN // PAGE.group
    codes, scale, low = quantize(tl.reshape(x, (COUNT, PAGE.group, WIDTH)), 1, BITS)
    group = first // PAGE.group + tl.arange(0, COUNT)
    at = group[:, None] * PAGE.head_size + c[None, :]
    at += base.to(tl.pointer_type(tl.float16))
    tl.store(at + PAGE.key_scale // 2, tl.reshape(scale, (COUNT, WIDTH)))
    tl.store(at + PAGE.key_min // 2, tl.reshape(low, (COUNT, WIDTH)))
    return tl.reshape(codes, (SPAN, WIDTH))


@triton.jit
def put_codes(base, k, v, first, c, given, SPAN: tl.constexpr, WIDTH: tl.constexpr,
              PAGE: tl.constexpr):  # fmt: skip
    """Keys and values as packed codes."""
    token = first + tl.arange(0, SPAN)
    if PAGE.by_channel:
        codes = put_by_channel(base, k, first, c, PAGE.key_bits, SPAN, WIDTH, PAGE)
    else:
        codes = put_by_token(base, k, token, c, given, PAGE.key_bits, PAGE.key_scale,
                             PAGE.key_min, SPAN, WIDTH, PAGE)  # fmt: skip
    put_words(base + PAGE.key_at, codes, first, c, given, PAGE.key_bits, SPAN, WIDTH, PAGE)
    codes = put_by_token(base, v, token, c, given, PAGE.value_bits, PAGE.value_scale,
                         PAGE.value_min, SPAN, WIDTH, PAGE)  # fmt: skip
    put_words(base + PAGE.value_at, codes, first, c, given, PAGE.value_bits, SPAN, WIDTH, PAGE)


@triton.jit
def put_plain(base, k, v, token, c, given, PAGE: tl.constexpr):
    """Keys and values as numbers, or as int8 with a scale for each token."""
    real = given[:, None] & (c < PAGE.head_size)[None, :]
    if PAGE.kind == "int8":
        k = put_int8(base + PAGE.key_scale, k, token, given)
        v = put_int8(base + PAGE.value_scale, v, token, given)
        k, v = k.to(tl.int8), v.to(tl.int8)
    elif PAGE.stored == tl.float16:
        k, v = to_half(k), to_half(v)
    else:
        k, v = narrow(k, PAGE.stored), narrow(v, PAGE.stored)
    pointer = base.to(tl.pointer_type(PAGE.stored))
    octet = (token // 8 * (8 * PAGE.head_size) + token % 8)[:, None] + c[None, :] * 8
    SIZE: tl.constexpr = PAGE.stored.primitive_bitwidth // 8
    tl.store(pointer + PAGE.key_at // SIZE + octet, k, mask=real)
    at = token[:, None] * PAGE.head_size + c[None, :]
    tl.store(pointer + PAGE.value_at // SIZE + at, v, mask=real)


@triton.jit
def put_int8(base, x, token, given):
    """Write the tokens' scales; return the codes as float32."""
    largest = tl.max(tl.abs(x), 1)
    scale = to_half(divided(largest, 127))
    tl.store(base.to(tl.pointer_type(tl.float16)) + token, scale, mask=given)
    return tl.clamp(round_even(x * inverse_of(scale)[:, None]), -127.0, 127.0)


@triton.jit
def put(base, k, v, first, c, given, SPAN: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr):
    """Encode ``[SPAN, WIDTH]`` tokens at place ``first`` of a page."""
    if PAGE.kind == "codes":
        put_codes(base, k, v, first, c, given, SPAN, WIDTH, PAGE)
    else:
        put_plain(base, k, v, first + tl.arange(0, SPAN), c, given, PAGE)


@triton.jit
def channels(part, WIDTH: tl.constexpr, PAGE: tl.constexpr):
    """KV head and channels of a program; beyond a lone group of codes its last one is repeated."""
    PARTS: tl.constexpr = (PAGE.head_size + WIDTH - 1) // WIDTH
    c = part % PARTS * WIDTH + tl.arange(0, WIDTH)
    if PAGE.kind == "codes" and PARTS * WIDTH > PAGE.head_size:
        c = tl.minimum(c, PAGE.head_size - 1)
    return part // PARTS, c


@launched
def absorb(
    key, value, query_start, stored_count, ring_count, stored_after, store_row, pages, table, slots,
    table_stride, slots_stride, key_stride, value_stride,
    page_stride: tl.int64, head_stride: tl.int64,
    PAGE: tl.constexpr, SPAN: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Span ``program_id(0)`` of what one request moves from ring and step to the store."""
    seq, part = tl.program_id(1), tl.program_id(2)
    head, c = channels(part, WIDTH, PAGE)
    stored, after = tl.load(stored_count + seq), tl.load(stored_after + seq)
    first = stored // SPAN * SPAN + tl.program_id(0) * SPAN
    if first < after:
        request = request_of(pages, table, table_stride, slots, slots_stride, seq.to(tl.int64),
                             head, page_stride, head_stride, PAGE)  # fmt: skip
        slot = first + tl.arange(0, SPAN)
        given = (slot >= stored) & (slot < after)
        k, v = pending(request, key, value, key_stride, value_stride, tl.load(query_start + seq),
                       tl.load(ring_count + seq), slot - stored, c, given, PAGE)  # fmt: skip
        store = store_of(request, tl.load(store_row + seq), PAGE)
        base = run_at(store, first // PAGE.tokens, PAGE)
        put(base, k, v, first % PAGE.tokens, c, given, SPAN, WIDTH, PAGE)


@launched
def keep_ring(
    key, value, query_start, ring_count, stored_count, stored_after, appended, pages, table, slots,
    table_stride, slots_stride, key_stride, value_stride,
    page_stride: tl.int64, head_stride: tl.int64,
    PAGE: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Write the fresh tokens that stay in the ring: span ``program_id(0)`` of the ring."""
    seq, head, c = tl.program_id(1), tl.program_id(2), tl.arange(0, PAGE.width)
    ring, count = tl.load(ring_count + seq), tl.load(appended + seq)
    absorbed = tl.load(stored_after + seq) - tl.load(stored_count + seq)
    place = tl.program_id(0) * SPAN + tl.arange(0, SPAN)
    fresh = place + absorbed - ring  # number of the fresh token that comes here
    valid = (fresh >= 0) & (fresh < count)
    line = (tl.load(query_start + seq) + fresh).to(tl.int64)[:, None]
    channel = head * PAGE.head_size + c[None, :]
    real = valid[:, None] & (c < PAGE.head_size)[None, :]
    k = tl.load(key + line * key_stride + channel, mask=real, other=0.0)
    v = tl.load(value + line * value_stride + channel, mask=real, other=0.0)
    request = request_of(pages, table, table_stride, slots, slots_stride, seq.to(tl.int64), head,
                         page_stride, head_stride, PAGE)  # fmt: skip
    put_ring(request, place, k, v, c, valid, PAGE)


@triton.jit
def put_ring(request, place, k, v, c, valid, PAGE: tl.constexpr):
    """Ring tokens in 16 bit: ``[key | value]``."""
    base = ring_place(request, place, valid, PAGE)
    k, v = k.to(tl.float32), v.to(tl.float32)
    if PAGE.ring == tl.float16:
        k, v = to_half(k), to_half(v)
    else:
        k, v = narrow(k, PAGE.ring), narrow(v, PAGE.ring)
    real = valid[:, None] & (c < PAGE.head_size)[None, :]
    tl.store(base[:, None] + c[None, :], k, mask=real)
    tl.store(base[:, None] + PAGE.head_size + c[None, :], v, mask=real)


@launched
def write(
    inverse, key, value, stored, held, head_rows, pages, row, slots, store_row, slots_stride,
    page_stride: tl.int64, head_stride: tl.int64,
    PAGE: tl.constexpr, SPAN: tl.constexpr, WIDTH: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """Span ``program_id(0)`` of one request's store, or of its ring, from numbered rows."""
    part = tl.program_id(1)
    head, c = channels(part, WIDTH, PAGE)
    first = tl.program_id(0) * SPAN
    place = first + tl.arange(0, SPAN)
    request = request_of(
        pages, row, 0, slots, slots_stride, 0, head, page_stride, head_stride, PAGE
    )
    if RING:
        slot = stored + place
        k, v, given = numbered(
            inverse, key, value, held, head_rows, head, slot, c, slot < held, PAGE
        )
        put_ring(request, place, k, v, c, given, PAGE)
    else:
        k, v, given = numbered(
            inverse, key, value, held, head_rows, head, place, c, place < stored, PAGE
        )
        if tl.max(given.to(tl.int32), 0) > 0:  # the place of a page that a head lacks is another's
            base = run_at(store_of(request, store_row, PAGE), first // PAGE.tokens, PAGE)
            put(base, k, v, first % PAGE.tokens, c, given, SPAN, WIDTH, PAGE)
