"""Numbers that must come out to the last bit, because pages are compared byte for byte.

Run by ``test_triton`` in Triton's interpreter, and by ``make gpu-check`` on a GPU.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from cache_policies.kernels.triton.device.types import divided, inverse_of, narrow, round_even
from tests.kernels.triton.setup import there

SIZE = 1 << 15


@triton.jit
def _apply(x, out, WHAT: tl.constexpr, BY: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    value = tl.load(x + at)
    if WHAT == "divided":
        value = divided(value, BY)
    elif WHAT == "inverse":
        value = inverse_of(value)
    elif WHAT == "rounded":
        value = round_even(value)
    else:
        value = narrow(value, tl.bfloat16)
    tl.store(out + at, value)


def applied(
    x: torch.Tensor, what: str, by: int = 1, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    x_there, out = there(x, torch.empty(SIZE, dtype=dtype))
    _apply[(1,)](x_there, out, WHAT=what, BY=by, SIZE=SIZE, enable_fp_fusion=False)
    return out.cpu()


def numbers() -> torch.Tensor:
    """Positive float32 of all sizes."""
    rng = torch.Generator().manual_seed(0)
    mantissa = 1 + torch.rand(SIZE, generator=rng)
    return torch.ldexp(mantissa, torch.randint(-40, 40, (SIZE,), generator=rng))


@pytest.mark.parametrize("by", [3, 15, 127, 255])
def test_quotients_are_rounded_once(by: int) -> None:
    x = numbers()
    assert torch.equal(applied(x, "divided", by), x / by)


def test_the_inverse_of_every_float16_is_rounded_once() -> None:
    scales = torch.arange(SIZE, dtype=torch.int32).to(torch.int16).view(torch.float16)
    scales = scales.where(scales.isfinite(), torch.zeros((), dtype=torch.float16))
    expected = torch.where(scales > 0, 1 / scales.float(), 0.0)
    assert torch.equal(applied(scales, "inverse"), expected)


def test_halves_are_rounded_to_even_and_bfloat16_to_the_nearest() -> None:
    x = torch.arange(SIZE).float() / 8 - 2000
    assert torch.equal(applied(x, "rounded"), x.round())
    x = numbers()
    assert torch.equal(applied(x, "narrow", dtype=torch.bfloat16), x.bfloat16())
