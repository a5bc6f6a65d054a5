"""A constant taken from all keys: softmax does not see it, and large biases become small."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from cache_policies.kernels.cpu import CpuKernel
from cache_policies.kernels.reference import ReferenceKernel
from tests.kernels.harness import EXACT, TOLERANCE, Setup

if TYPE_CHECKING:
    from cache_policies.kernels.contract import Kernel

COMPUTED, FRESH = [300, 45], [1, 20]


def _attend(setup: Setup, kernel: type[Kernel], bias: torch.Tensor) -> torch.Tensor:
    """Outputs over keys with a bias, all written by the kernel itself."""
    one = kernel(setup.layout, setup.shape)
    _, key, value = setup.tokens(sum(COMPUTED), 1)
    one.append(setup.pages, setup.batch([0, 0], COMPUTED), key + bias, value)
    query, key, value = setup.tokens(sum(FRESH), 2)
    out = torch.zeros_like(query)
    one.attend(setup.pages, setup.batch(COMPUTED, FRESH), query, key + bias, value, out)
    return out


@pytest.mark.parametrize("kernel", [CpuKernel, ReferenceKernel])
@pytest.mark.parametrize("codec", ["raw", "int8", "kivi-4bit", "flexgen-4bit", "rotated-4bit"])
def test_the_offset_of_a_bias_leaves_the_outputs_without_it(
    codec: str, kernel: type[Kernel]
) -> None:
    setup = Setup.make(codec)
    plain = _attend(setup, kernel, torch.zeros(2, 64))
    bias = torch.zeros(2, 64)
    bias[:, 7], bias[1, 40] = 64.0, -32.0
    biased = Setup.make(codec)
    biased.shape = replace(biased.shape, key_offset=bias)
    got = _attend(biased, kernel, bias)
    limit = EXACT[torch.float32] if codec == "raw" else TOLERANCE[torch.float32]
    torch.testing.assert_close(got, plain, rtol=limit, atol=limit)


@pytest.mark.parametrize("codec", ["raw", "kivi-4bit", "flexgen-4bit", "rotated-3bit"])
def test_read_and_write_are_of_the_keys_themselves(codec: str) -> None:
    pages, held = [], []
    for kernel in (CpuKernel, ReferenceKernel):
        setup = Setup.make(codec, seqs=1)
        setup.shape = replace(setup.shape, key_offset=torch.full((2, 64), 50.0))
        one = kernel(setup.layout, setup.shape)
        key, value = torch.randn(2, 2, 128, 64, generator=torch.Generator().manual_seed(3))
        key += 50
        batch = setup.batch([0], [0]).one(0, held=128, stored=128, store_row=_first_row(setup))
        index = torch.arange(128, dtype=torch.int32).expand(2, -1).contiguous()
        one.write(setup.pages, batch, index, key.clone(), value.clone())
        fresh = torch.zeros(0, 2, 64)
        held.append(one.read(setup.pages, batch, fresh, fresh))
        pages.append(setup.pages)
        assert (held[-1][0] - key).norm() < 0.3 * (key - 50).norm()
    assert torch.equal(*pages)
    torch.testing.assert_close(held[0], held[1])


def _first_row(setup: Setup) -> int:
    return setup.layout.ring_pages
