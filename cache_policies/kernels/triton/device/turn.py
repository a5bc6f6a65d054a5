"""Rows as pages hold them, keys without the layer's offset, rotated by some codecs; and back."""

import triton
import triton.language as tl

from cache_policies.kernels.triton.device.launched import launched
from cache_policies.kernels.triton.device.types import narrow


@triton.jit
def rotated(x, PAGE: tl.constexpr):
    """Rows ``[n, width]`` float32, the sums in the order of ``pages/codecs/rotation.py``.

    A stage takes sums and differences of neighbours and lays them side by side, so that the next
    one's pairs are neighbours; after the last stage all channels are back in their places.
    """
    SIZE: tl.constexpr = PAGE.rotation
    STAGES: tl.constexpr = PAGE.rotation_stages
    n: tl.constexpr = x.shape[0]
    d: tl.constexpr = x.shape[1]
    for _ in tl.static_range(STAGES):
        first, second = tl.split(tl.reshape(x, (n, d // SIZE, SIZE // 2, 2)))
        x = tl.permute(tl.join(first + second, first - second), (0, 1, 3, 2))
        x = tl.reshape(x, (n, d))
    return x * PAGE.rotation_scale


@launched
def turn(x, out, offset, count, stride, head_stride, out_stride, out_head_stride,
         PAGE: tl.constexpr, BLOCK: tl.constexpr, OFFSET: tl.constexpr,
         BACK: tl.constexpr):  # fmt: skip
    """``BLOCK`` rows of one head; ``offset`` is ``[heads, head_size]``."""
    head, c = tl.program_id(1).to(tl.int64), tl.arange(0, PAGE.width)
    row = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    real = (row < count) & (c < PAGE.head_size)[None, :]
    at = x + row * stride + head * head_stride + c[None, :]
    y = tl.load(at, mask=real, other=0.0).to(tl.float32)
    if OFFSET:
        at = offset + head * PAGE.head_size + c
        taken = tl.load(at, mask=c < PAGE.head_size, other=0.0)[None, :]
    if OFFSET and not BACK:
        y -= taken
    if PAGE.rotation:
        y = rotated(y, PAGE)
    if OFFSET and BACK:
        y += taken
    at = out + row * out_stride + head * out_head_stride + c[None, :]
    tl.store(at, narrow(y, out.dtype.element_ty), mask=real)
