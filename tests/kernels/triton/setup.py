"""What the checks of the Triton kernels share: the device, and both kernels on the same pages."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import HealthCheck, settings

from cache_policies.kernels.reference import ReferenceKernel
from cache_policies.kernels.triton.kernel import TritonKernel
from cache_policies.kernels.triton.page import interpreting
from cache_policies.pages.codecs.packing import PLANES
from tests.kernels.harness import Setup

if TYPE_CHECKING:
    from cache_policies.kernels.contract import Batch

DEVICE = torch.device("cpu" if interpreting() else "cuda")
ALL = os.environ.get("TRITON_CHECKS") == "all"  # the nightly run; the others take a few examples


def examples(few: int, many: int) -> settings:
    """So many random examples in the daily and in the nightly run."""
    return settings(
        max_examples=many if ALL else few,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def make(policy: str, **options: Any) -> Setup:
    return Setup.make(policy, packing=PLANES, **options)


def there(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """On the device; copies."""
    return [x.clone().to(DEVICE) for x in tensors]


def on_device(batch: Batch) -> Batch:
    slots = None if batch.slots is None else batch.slots.to(DEVICE)
    return replace(batch, block_table=batch.block_table.to(DEVICE), slots=slots)


class Both:
    """The reference on the host and Triton's kernels on the device, over the same pages."""

    def __init__(self, setup: Setup, **options: Any) -> None:
        self.setup = setup
        self.reference = ReferenceKernel(setup.layout, setup.shape)
        self.triton = TritonKernel(setup.layout, setup.shape, **options)
        self.pages = setup.pages.clone()
        (self.pages_there,) = there(setup.pages)

    def attend(self, batch: Batch, tokens: Any, expected: Any, got: Any) -> list[torch.Tensor]:
        """Both outputs; ``expected`` and ``got`` are options of the two calls."""
        query = tokens[0]
        output = torch.full_like(query, float("nan"))
        self.reference.attend(self.pages, batch, *tokens, output, **expected)
        (output_there,) = there(torch.full_like(query, float("nan")))
        self.triton.attend(self.pages_there, on_device(batch), *there(*tokens), output_there, **got)
        return [output, output_there.cpu()]

    def append(self, batch: Batch, key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
        """Both pages after an append."""
        self.reference.append(self.pages, batch, key, value)
        self.triton.append(self.pages_there, on_device(batch), *there(key, value))
        return [self.pages, self.pages_there.cpu()]
