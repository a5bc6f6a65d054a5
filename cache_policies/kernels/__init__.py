"""Kernels by name.

``auto`` takes Triton's on a GPU, else the C++ ones, and falls back to the reference.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING

import torch

from cache_policies.errors import PolicyError
from cache_policies.kernels.reference import ReferenceKernel

if TYPE_CHECKING:
    from cache_policies.kernels.contract import Kernel

KERNELS = ("auto", "cpu", "triton", "reference")

logger = logging.getLogger(__name__)


@cache
def kernel_class(name: str) -> type[Kernel]:
    """The kernel class a user asked for; a fall-back is logged once.

    Args:
        name: one of ``KERNELS``.

    Raises:
        PolicyError: unknown name, or ``cpu`` or ``triton`` was forced and cannot run here.

    """
    if name not in KERNELS:
        raise PolicyError(f"unknown cache_kernel {name!r}; allowed: {', '.join(KERNELS)}")
    if name == "reference":
        return ReferenceKernel
    if name == "triton" or (name == "auto" and torch.cuda.is_available()):
        return _triton_kernel()
    try:
        from cache_policies.kernels.cpu import CpuKernel
    except ImportError as error:
        if name == "cpu":
            raise PolicyError(f"cache_kernel=cpu cannot be loaded: {error}") from error
        logger.warning(
            "The C++ kernels cannot be loaded (%s); using the reference kernels, "
            "which are many times slower.",
            error,
        )
        return ReferenceKernel
    return CpuKernel


def _triton_kernel() -> type[Kernel]:
    """Triton's kernels, where there is a GPU or Triton's interpreter is switched on."""
    try:
        from cache_policies.kernels.triton.kernel import TritonKernel
        from cache_policies.kernels.triton.page import interpreting
    except ImportError as error:
        raise PolicyError(
            f"cache_kernel=triton cannot be loaded: {error}; pip install '.[cuda]' in a clone, or "
            "choose cache_kernel=cpu"
        ) from error
    if not torch.cuda.is_available() and not interpreting():
        raise PolicyError(
            "cache_kernel=triton needs a GPU, and torch finds none; choose cache_kernel=cpu, or "
            "set TRITON_INTERPRET=1 to try the kernels slowly on a CPU"
        )
    return TritonKernel
