"""The one place where kernels are launched; a recorder may take the place of the GPU."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from triton.runtime import driver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cache_policies.kernels.triton.page import Page

WAVES = 4  # of 64 lanes: with more, a program has half the registers of an AMD GPU, and spills
REGISTERS = 255  # a thread's most on NVIDIA GPUs
REGISTER_FILE = 1 << 16  # what the threads of a program have together
BLACKWELL = 100  # compute capability, as Triton says it


@dataclass(frozen=True)
class Launch:
    """One launch: what it takes to run a kernel, or to compile it for a GPU that is not here.

    Attributes:
        function: a ``triton.jit`` function.
        grid: programs in three dimensions.
        arguments: tensors and numbers, in the function's order.
        constants: compile-time arguments by name.
        options: warps, stages, fusion and registers.

    """

    function: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]

    def here(self) -> Launch:
        """The same as the GPU of this process runs it."""
        if torch.version.hip:
            return self.on_amd()
        launch = self
        if self.constants["PAGE"].hides and _is_blackwell():
            launch = self.on_blackwell()
        if _large and self._key in _large:
            launch = launch.with_one_stage()
        return launch.with_all_registers() if _spilling and self._key in _spilling else launch

    def on_amd(self) -> Launch:
        """The same for an AMD GPU: fewer, wider warps, and no TF32."""
        options = self.options | {"num_warps": min(WAVES, self.options["num_warps"])}
        page = _page_with(self.constants["PAGE"], precision="ieee", hides="")
        return replace(self, constants=self.constants | {"PAGE": page}, options=options)

    def on_blackwell(self) -> Launch:
        """The same for compute capability 10 and above, where prefill spills with keys hidden."""
        page = self.constants["PAGE"]
        page = _page_with(page, hides=page.hides and "values")
        return replace(self, constants=self.constants | {"PAGE": page})

    def with_all_registers(self) -> Launch:
        """The same where NVIDIA's assembler, left alone, spills to run more programs at a time."""
        most = min(REGISTERS, REGISTER_FILE // (32 * self.options["num_warps"]))
        return replace(self, options=self.options | {"maxnreg": most})

    def with_one_stage(self) -> Launch:
        """The same without what a software pipeline holds in shared memory."""
        return replace(self, options=self.options | {"num_stages": 1})

    def note_size(self) -> bool:
        """Let ``here`` give it one stage; False if it has no more."""
        new = self.options["num_stages"] > 1 and self._key not in _large
        if new:
            _large.add(self._key)
        return new

    def note_spills(self) -> bool:
        """Let ``here`` give it all registers; False if it has them, or the GPU is AMD's."""
        new = not torch.version.hip and self._key not in _spilling
        if new:
            _spilling.add(self._key)
        return new

    @property
    def _key(self) -> tuple[Any, ...]:
        return self.function, *sorted(self.constants.items(), key=itemgetter(0))


@cache  # a worker has one GPU, and Triton asks it anew each time
def _is_blackwell() -> bool:
    target = driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= BLACKWELL


@cache
def _page_with(page: Page, **fields: Any) -> Page:
    return replace(page, **fields)


_spilling: set[tuple[Any, ...]] = set()  # what warm.py found
_large: set[tuple[Any, ...]] = set()


def _run(launch: Launch) -> None:
    launch = launch.here()
    launch.function[launch.grid](*launch.arguments, **launch.constants, **launch.options)


_launcher: Callable[[Launch], None] = _run


def launch(
    function: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    warps: int = 4,
    stages: int = 2,
    fusion: bool = True,
    **constants: Any,
) -> None:
    """Launch a kernel; nothing where the grid is empty.

    Args:
        function: a ``triton.jit`` function.
        grid: programs in up to three dimensions.
        arguments: its arguments at run time.
        warps: warps of a program.
        stages: of the software pipeline.
        fusion: whether a product and a sum may be rounded once.
        constants: its arguments at compile time.

    """
    if 0 not in grid:
        options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": fusion}
        _launcher(Launch(function, grid, arguments, constants, options))


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect launches instead of running them, to compile them for other machines."""
    global _launcher  # noqa: PLW0603
    found: list[Launch] = []
    _launcher = found.append
    try:
        yield found
    finally:
        _launcher = _run
