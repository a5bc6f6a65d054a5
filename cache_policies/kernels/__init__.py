"""Kernels by name; ``auto`` takes the C++ one and falls back to the reference."""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING

from cache_policies.errors import PolicyError
from cache_policies.kernels.reference import ReferenceKernel

if TYPE_CHECKING:
    from cache_policies.kernels.contract import Kernel

KERNELS = ("auto", "cpu", "reference")

logger = logging.getLogger(__name__)


@cache
def kernel_class(name: str) -> type[Kernel]:
    """The kernel class a user asked for; a fall-back is logged once.

    Args:
        name: one of ``KERNELS``.

    Raises:
        PolicyError: unknown name, or ``cpu`` was forced and cannot be loaded.

    """
    if name not in KERNELS:
        raise PolicyError(f"unknown cache_kernel {name!r}; allowed: {', '.join(KERNELS)}")
    if name == "reference":
        return ReferenceKernel
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
