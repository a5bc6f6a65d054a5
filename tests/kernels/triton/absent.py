"""A GPU that is not here, as far as Triton asks for one: it compiles, and launches nothing."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any

import torch
import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from cache_policies.kernels.triton import launch, warm
from cache_policies.kernels.triton.device import attend, encode, mass, page_mass, read, turn

if TYPE_CHECKING:
    import pytest
    from triton.backends.compiler import GPUTarget

NAME = "NVIDIA Absent"
_asks = launch._is_blackwell.__wrapped__  # each time: tests have GPUs of several kinds
_numbers = count(1000)  # a device that no function has compiled for


class AbsentGpu:
    """Triton's driver of it.

    Attributes:
        target: what is compiled for.
        compiled: kernels, in the order in which Triton wanted them compiled, by the stand-in.
        shared: bytes of shared memory that it has, for kernels that were really compiled.

    """

    def __init__(self, target: GPUTarget) -> None:
        self.target, self.number = target, next(_numbers)
        self.compiled: list[str] = []
        self.shared = 1 << 20
        self.utils = self

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_device_properties(self, _device: int) -> dict[str, int]:
        return {"max_shared_mem": self.shared}

    def launcher_cls(self, *_: Any) -> Any:
        return lambda *_: None

    def load_binary(self, *_: Any) -> tuple[Any, ...]:
        """Module, function, registers, spills, most threads."""
        return object(), None, 0, 0, 1024

    def unload_module(self, _module: Any) -> None:
        """Nothing was loaded."""

    def compile(self, source: Any, **_: Any) -> Any:
        """Note what is wanted, instead of compiling it for seconds."""
        self.compiled.append(f"{source.fn.__name__} {source.signature} {source.attrs}")
        return Kernel()


class Kernel:
    """What a stand-in for the compiler returns."""

    function = packed_metadata = None
    n_spills = 0

    def run(self, *_: Any) -> None:
        """Launch nothing."""

    def launch_metadata(self, *_: Any) -> None:
        return None

    def __getitem__(self, _grid: Any) -> Any:
        return self.run


def absent_gpu(
    monkeypatch: pytest.MonkeyPatch, target: GPUTarget, *, compiles: bool = False
) -> AbsentGpu:
    """Let Triton find one, on which nothing is ready, until the test ends.

    Args:
        monkeypatch: undoes it.
        target: what is compiled for.
        compiles: whether Triton's compiler compiles; else a stand-in notes what it would.

    """
    gpu = AbsentGpu(target)
    monkeypatch.setattr(driver, "_active", gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: NAME)
    monkeypatch.setattr(warm, "_ready", set())
    monkeypatch.setattr(launch, "_spilling", set())
    monkeypatch.setattr(launch, "_large", set())
    monkeypatch.setattr(launch, "_is_blackwell", _asks)
    for module in (attend, encode, mass, page_mass, read, turn):
        for function in vars(module).values():
            if isinstance(function, JITFunction):  # each remembers its compiler
                monkeypatch.setattr(function, "compile", None, raising=False)
    if not compiles:
        monkeypatch.setattr(triton.compiler, "compile", gpu.compile)
    return gpu
