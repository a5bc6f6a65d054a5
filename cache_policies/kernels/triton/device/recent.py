"""Tokens in 16 bit or in the model's dtype: those of the ring, and the fresh ones."""

import triton
import triton.language as tl


@triton.jit
def ring_at(pages, row, page_stride, head_offset, j, count, PAGE: tl.constexpr):
    """Addresses ``[tokens, width]`` of keys and values of ring tokens ``j``."""
    page = tl.load(row + j // PAGE.ring_tokens, mask=j < count, other=0).to(tl.int64)
    place = (j % PAGE.ring_tokens) * (4 * PAGE.head_size)
    base = (pages + page * page_stride + head_offset + place).to(tl.pointer_type(PAGE.ring))
    at = base[:, None] + tl.arange(0, PAGE.width)[None, :]
    return at, at + PAGE.head_size


@triton.jit
def fresh_at(key, value, key_stride, value_stride, start, head, j, PAGE: tl.constexpr):
    """Addresses ``[tokens, width]`` of keys and values of fresh tokens ``j``."""
    row = (start + j).to(tl.int64)[:, None]
    at = head * PAGE.head_size + tl.arange(0, PAGE.width)[None, :]
    return key + row * key_stride + at, value + row * value_stride + at


@triton.jit
def recent(key, value, valid, PAGE: tl.constexpr):
    """Load keys and values in ``PAGE.recent``; 0 where ``valid`` is false."""
    real = valid[:, None] & (tl.arange(0, PAGE.width) < PAGE.head_size)[None, :]
    k = tl.load(key, mask=real, other=0.0).to(PAGE.recent)
    return k, tl.load(value, mask=real, other=0.0).to(PAGE.recent)
