"""The recurrences of ``reference`` in C++: checks, then addresses to the extension ``_scans``.

Instruction sets are chosen at run time (AVX-512; AVX2+FMA+F16C; portable). Threads are OpenMP's:
in a process that imported torch, torch's own pool, hence vLLM's binding. States are computed in
float32; tensors and stored states may be float32, float16 or bfloat16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from linear_models.scans import _scans  # type: ignore[attr-defined]  # built from src/

if TYPE_CHECKING:
    from linear_models.scans.batch import Batch

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_NONE = (0, 0, 0)
MAX_WIDTH = 8  # of a convolution; src/conv.h
MAX_SIZE = 256  # states of a Mamba 1 channel; src/selective_scan.h
MAX_HEAD = 256  # items of an RWKV head; src/heads.h
HEAD_MULTIPLE = 16  # lanes of AVX-512


def supported_isas() -> list[str]:
    """Instruction sets this CPU runs, best first."""
    return list(_scans.supported())


_BEST = supported_isas()[0]


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    states: torch.Tensor,
    batch: Batch,
    out: torch.Tensor,
    *,
    activate: bool = True,
    isa: str = _BEST,
    num_threads: int = 0,
) -> None:
    """As ``reference.causal_conv``; weight and bias are float32.

    Raises:
        ValueError: a shape, dtype or stride that the kernel does not take.

    """
    channels, width = weight.shape
    _require(1 < width <= MAX_WIDTH, f"a convolution of width {width} is not within 2..{MAX_WIDTH}")
    _scans.causal_conv(
        isa,
        _batch(batch, states),
        _rows("x", x, batch, channels),
        _rows("out", out, batch, channels),
        _states(states, (width - 1, channels)),
        _floats("weight", weight, (channels, width)),
        _floats("bias", bias, (channels,)),
        channels,
        width,
        activate,
        num_threads,
    )


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    bias: torch.Tensor | None,
    gate: torch.Tensor | None,
    states: torch.Tensor,
    batch: Batch,
    out: torch.Tensor,
    *,
    isa: str = _BEST,
    num_threads: int = 0,
) -> None:
    """As ``reference.selective_scan``; ``a``, ``d`` and the bias are float32.

    Raises:
        ValueError: a shape, dtype or stride that the kernel does not take.

    """
    channels, size = a.shape
    _require(size <= MAX_SIZE, f"{size} states of a channel are more than {MAX_SIZE}")
    _require(states.stride(2) == 1, "states of a channel are not contiguous")
    b, c = b.float(), c.float()  # small; every channel reads them
    _scans.selective_scan(
        isa,
        _batch(batch, states),
        _rows("x", x, batch, channels),
        _rows("dt", dt, batch, channels),
        _rows("b", b, batch, size),
        _rows("c", c, batch, size),
        _NONE if gate is None else _rows("gate", gate, batch, channels),
        _rows("out", out, batch, channels),
        _states(states, (channels, size)),
        _floats("a", a, (channels, size)),
        _floats("d", d, (channels,)),
        _floats("bias", bias, (channels,)),
        channels,
        size,
        num_threads,
    )


def wkv5(
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    bonus: torch.Tensor,
    states: torch.Tensor,
    batch: Batch,
    out: torch.Tensor,
    *,
    isa: str = _BEST,
    num_threads: int = 0,
) -> None:
    """As ``reference.wkv5``; decay, bonus and states are float32.

    Raises:
        ValueError: a shape, dtype or stride that the kernel does not take.

    """
    heads, size = decay.shape
    _scans.wkv5(
        isa,
        _batch(batch, states),
        _rows("r", r, batch, heads * size),
        _rows("k", k, batch, heads * size),
        _rows("v", v, batch, heads * size),
        _rows("out", out, batch, heads * size),
        _matrices(states, heads, size),
        _floats("decay", decay, (heads, size)),
        _floats("bonus", bonus, (heads, size)),
        heads,
        size,
        num_threads,
    )


def wkv7(
    r: torch.Tensor,
    w: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    removed: torch.Tensor,
    rate: torch.Tensor,
    states: torch.Tensor,
    batch: Batch,
    out: torch.Tensor,
    *,
    isa: str = _BEST,
    num_threads: int = 0,
) -> None:
    """As ``reference.wkv7``; states are float32.

    Raises:
        ValueError: a shape, dtype or stride that the kernel does not take.

    """
    _require(states.dim() == 4, f"states: {states.dim()} axes, not 4")
    heads, size = states.shape[1:3]
    inputs = {"r": r, "w": w, "k": k, "v": v, "removed": removed, "rate": rate, "out": out}
    _scans.wkv7(
        isa,
        _batch(batch, states),
        [_rows(name, x, batch, heads * size) for name, x in inputs.items()],
        _matrices(states, heads, size),
        heads,
        size,
        num_threads,
    )


def rg_lru(
    x: torch.Tensor,
    input_gate: torch.Tensor,
    gate: torch.Tensor,
    rate: torch.Tensor,
    states: torch.Tensor,
    batch: Batch,
    out: torch.Tensor,
    *,
    isa: str = _BEST,
    num_threads: int = 0,
) -> None:
    """As ``reference.rg_lru``; ``rate`` is float32.

    Raises:
        ValueError: a shape, dtype or stride that the kernel does not take.

    """
    (channels,) = rate.shape
    _require(states.stride(1) == 1, "states of a request are not contiguous")
    _scans.rg_lru(
        isa,
        _batch(batch, states),
        _rows("x", x, batch, channels),
        _rows("input_gate", input_gate, batch, channels),
        _rows("gate", gate, batch, channels),
        _rows("out", out, batch, channels),
        _states(states[:, None], (1, channels)),
        _floats("rate", rate, (channels,)),
        channels,
        num_threads,
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"scan: {message}")


def _batch(batch: Batch, states: torch.Tensor) -> tuple[int, int, int, int]:
    """Number of requests and addresses. Slots must be within the states."""
    starts, slots, has = batch.query_start, batch.slots, batch.has_state
    _require(starts.dtype == torch.int32 and starts.is_contiguous(), "query_start: int32")
    _require(slots.dtype == torch.int32 and slots.is_contiguous(), "slots: int32")
    _require(has.dtype == torch.bool and has.is_contiguous(), "has_state: bool")
    _require(len(starts) - 1 == len(slots) == len(has), "batch: lengths")
    _require(batch.last_slot < len(states), f"slot {batch.last_slot} of {len(states)}")
    return len(slots), starts.data_ptr(), slots.data_ptr(), has.data_ptr()


def _rows(name: str, x: torch.Tensor, batch: Batch, width: int) -> tuple[int, int, int]:
    """Address, stride and dtype of a row per token."""
    _require(x.dim() == 2 and x.shape[1] == width, f"{name}: {tuple(x.shape)}, not [.., {width}]")
    _require(len(x) >= batch.num_tokens, f"{name}: {len(x)} rows for {batch.num_tokens} tokens")
    _require(x.stride(1) == 1 or width == 1, f"{name}: a row is not contiguous")
    return x.data_ptr(), x.stride(0), _dtype(name, x)


def _states(states: torch.Tensor, shape: tuple[int, int]) -> tuple[int, int, int, int, int]:
    """Address, strides of slots, rows and items, and dtype."""
    _require(states.shape[1:] == shape, f"states: {tuple(states.shape[1:])}, not {shape}")
    return states.data_ptr(), *states.stride(), _dtype("states", states)  # type: ignore[return-value]


def _matrices(states: torch.Tensor, heads: int, size: int) -> tuple[int, int, int, int, int]:
    """The same of the heads' matrices of RWKV."""
    _require(
        size % HEAD_MULTIPLE == 0 and size <= MAX_HEAD,
        f"heads of {size} are not a multiple of {HEAD_MULTIPLE} up to {MAX_HEAD}",
    )
    _require(states.shape[1:] == (heads, size, size), f"states: {tuple(states.shape[1:])}")
    _require(states.dtype == torch.float32, f"states: {states.dtype} is not float32")
    _require(states[:1].is_contiguous(), "states: a slot is not contiguous")
    return _states(states.flatten(1, 2), (heads * size, size))


def _floats(name: str, x: torch.Tensor | None, shape: tuple[int, ...]) -> int:
    """Address of a float32 parameter; zero for none."""
    if x is None:
        return 0
    _require(x.dtype == torch.float32 and x.is_contiguous(), f"{name}: contiguous float32")
    _require(x.shape == shape, f"{name}: {tuple(x.shape)}, not {shape}")
    return int(x.data_ptr())


def _dtype(name: str, x: torch.Tensor) -> int:
    _require(x.dtype in _DTYPES, f"{name}: {x.dtype} is not float32, float16 or bfloat16")
    return _DTYPES[x.dtype]
