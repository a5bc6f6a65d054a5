"""Tokens in 16 bit or in the model's dtype: those of the ring, and the fresh ones."""

import triton
import triton.language as tl

from cache_policies.kernels.triton.device.place import run_at


@triton.jit
def ring_place(request, j, valid, PAGE: tl.constexpr):
    """Addresses ``[tokens]`` of ring tokens ``j``: a key, followed by its value."""
    run = run_at(request, tl.where(valid, j // PAGE.ring_tokens, 0), PAGE)  # row[0] is there
    place = (j % PAGE.ring_tokens) * (4 * PAGE.head_size)
    return (run + place).to(tl.pointer_type(PAGE.ring))


@triton.jit
def ring_at(request, j, count, PAGE: tl.constexpr):
    """Addresses ``[tokens, width]`` of keys and values of ring tokens ``j``."""
    at = ring_place(request, j, j < count, PAGE)[:, None] + tl.arange(0, PAGE.width)[None, :]
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
