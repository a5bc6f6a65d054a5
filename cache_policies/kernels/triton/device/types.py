"""Conversions that give the same bits on a GPU and in the interpreter."""

import triton
import triton.language as tl

HALF = tl.constexpr(65504.0)


@triton.jit
def to_half(x):
    """float16, clamped to its range."""
    return tl.clamp(x, -HALF, HALF).to(tl.float16)


@triton.jit
def to_bfloat16(x):
    """Nearest bfloat16, ties to even; the interpreter's own conversion cuts off."""
    bits = x.to(tl.uint32, bitcast=True)
    bits += 0x7FFF + ((bits >> 16) & 1)
    bits = tl.where(x == x, bits, 0x7FC00000)
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def narrow(x, TYPE: tl.constexpr):
    """float32 in another type."""
    if TYPE == tl.bfloat16:
        return to_bfloat16(x)
    else:
        return x.to(TYPE)


@triton.jit
def divided(x, BY: tl.constexpr):
    """``x / BY`` of float32, rounded once, for whole numbers below 2 ** 8.

    Exact division is a call, around which registers are spilled. No quotient of 24 bits by 8 comes
    as near to the middle of two float32 as the product in float64 is wrong.
    """
    return (x.to(tl.float64) * tl.full((), 1.0 / BY, tl.float64)).to(tl.float32)


@triton.jit
def inverse_of(scale):
    """``1 / scale`` of float16 scales, rounded once as in ``divided``; 0 of 0."""
    s = tl.where(scale > 0, scale.to(tl.float32), 1.0)
    wide, rough = s.to(tl.float64), (1.0 / s).to(tl.float64)
    exact = (rough * (2.0 - wide * rough)).to(tl.float32)  # a step of Newton's: 2 ** -44
    return tl.where(scale > 0, exact, 0.0)


@triton.jit
def round_even(x):
    """Nearest integer, ties to even, of numbers below 2 ** 22."""
    return (x + 12582912.0) - 12582912.0
