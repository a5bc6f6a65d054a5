"""Where the tokens to be encoded come from: ring and fresh tokens, or rows given by number."""

import triton
import triton.language as tl

from cache_policies.kernels.triton.device.recent import ring_place


@triton.jit
def pending(request, key, value, key_stride, value_stride, start, ring, j, c, valid,
            PAGE: tl.constexpr):  # fmt: skip
    """Keys and values float32 ``[tokens, channels c]`` of ring tokens followed by fresh ones."""
    old = valid & (j < ring)
    at = ring_place(request, j, old, PAGE)[:, None] + c[None, :]
    real = (c < PAGE.head_size)[None, :]
    old = old[:, None] & real
    new = (valid & (j >= ring))[:, None] & real
    line = (start + j - ring).to(tl.int64)[:, None]
    channel = request[5] * PAGE.head_size + c[None, :]
    k_old, k_new = (
        tl.load(at, mask=old, other=0.0),
        tl.load(key + line * key_stride + channel, mask=new, other=0.0),
    )
    v_old = tl.load(at + PAGE.head_size, mask=old, other=0.0)
    v_new = tl.load(value + line * value_stride + channel, mask=new, other=0.0)
    k = tl.where(old, k_old.to(tl.float32), k_new.to(tl.float32))
    return k, tl.where(old, v_old.to(tl.float32), v_new.to(tl.float32))


@triton.jit
def numbered(inverse, key, value, held, head_rows, head, slot, c, valid, PAGE: tl.constexpr):
    """Rows of ``key``, ``head_rows`` of them a head, for slots, and whether there is one."""
    at = tl.load(inverse + head * held + slot, mask=valid, other=-1)
    given = at >= 0
    line = (head * head_rows + tl.where(given, at, 0)).to(tl.int64)[:, None] * PAGE.head_size
    real = given[:, None] & (c < PAGE.head_size)[None, :]
    k = tl.load(key + line + c[None, :], mask=real, other=0.0).to(tl.float32)
    return k, tl.load(value + line + c[None, :], mask=real, other=0.0).to(tl.float32), given
