"""No method waits for a device, or does more work on the host for more heads or tokens."""

from __future__ import annotations

import operator
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cache_policies.kernels.counts import all_tokens
from cache_policies.kernels.cpu import CpuKernel
from cache_policies.policy import parse
from cache_policies.policy.layouts import layouts
from cache_policies.retention import compactor, retention_methods
from cache_policies.step.step import Step
from tests.cache_policies.meta import DECODE, METHODS, PROMPT, drive, layer_of, one_method
from tests.cache_policies.worker import SIZE, Text, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ON_HOST = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__contains__", "cpu"}
SIZED_BY_DATA = {
    "_local_scalar_dense", "nonzero", "nonzero_numpy", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "equal", "is_nonzero", "bincount", "histc", "repeat_interleave",
}  # fmt: skip


class Waits(Exception):  # noqa: N818  # not an error of its own
    """Something would wait for the device."""


class Functions(TorchFunctionMode):
    """Fails on what brings a tensor's values to the host."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not Guard.paused and getattr(func, "__name__", "") in ON_HOST:
            raise Waits(func.__name__)
        return func(*args, **(kwargs or {}))


class Guard(TorchDispatchMode):
    """Fails on operators whose result's size depends on values; counts the others."""

    paused = False

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if not Guard.paused:
            masks = name in {"index", "index_put", "index_put_"} and any(
                x is not None and x.dtype in {torch.bool, torch.uint8} for x in args[1]
            )
            if masks or name in SIZED_BY_DATA:
                raise Waits(name)
            given = tree_leaves((args, kwargs))
            devices = {x.device.type for x in given if isinstance(x, torch.Tensor) and x.dim()}
            if len(devices) > 1 and name not in {"copy_", "_to_copy"}:
                raise Waits(f"{name} of tensors on {devices}")
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def paused() -> Iterator[None]:
    Guard.paused = True
    try:
        yield
    finally:
        Guard.paused = False


class OwnBusiness(CpuKernel):
    """A kernel for CPUs may look at values on a CPU."""

    def attend(self, *args: Any) -> None:
        with paused():
            super().attend(*args)

    def page_mass(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with paused():
            return super().page_mass(*args)

    def append(self, *args: Any) -> None:
        with paused():
            super().append(*args)

    def read(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with paused():
            return super().read(*args)

    def write(self, *args: Any) -> None:
        with paused():
            super().write(*args)

    def move(self, *args: Any) -> None:
        with paused():
            super().move(*args)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0, 0].item(),
        lambda x: x.tolist(),
        lambda x: int(x.sum()),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.cpu(),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: range(x.long().sum()),
        lambda x: operator.setitem(x, x > 0, 1.0),
        lambda x: 1.0 in x,
        lambda x: x.to("meta") + x,
    ],
)
def test_the_guard_sees_what_waits(wait: Callable[[torch.Tensor], Any]) -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(Waits), Functions(), Guard():
        wait(x)


@pytest.mark.parametrize("codec", ["raw", "kivi-4bit"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_waits_for_nothing(
    method: str, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, guard = Step.run, Guard()

    def guarded(*args: Any) -> None:
        with Functions(), guard:
            run(*args)

    monkeypatch.setattr(Step, "run", guarded)
    worker = Worker(codec, kernel=OwnBusiness)
    first, second = (worker.start(Text(PROMPT + 20, seed), method, PROMPT) for seed in (0, 1))
    for chunk in (PROMPT * 2 // 5, PROMPT * 3 // 5, *DECODE):
        worker.step([(first, chunk), (second, chunk)])
    assert guard.seen, "the method did nothing"


class Nothing:
    """A kernel without pages: checks that all it gets is on one device."""

    def __init__(self, layer_heads: int) -> None:
        self.heads, self.calls = layer_heads, Counter[str]()

    def attend(self, pages: Any, batch: Any, *tensors: Any) -> None:
        *tokens, mass, reads = tensors
        self._check("attend", pages, *tokens, batch.block_table, *batch.device_counts)
        if mass is not None:
            self._check("mass", pages, mass.out, *mass.device_counts)
        if reads is not None:
            self._check("reads", pages, reads.pages, reads.count, reads.first)

    def page_mass(
        self, pages: Any, batch: Any, query: Any, key: Any, blocks: torch.Tensor, samples: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._check("page_mass", pages, query, key, *batch.device_counts)
        lines = len(blocks), self.heads
        most = -(-int(batch.host.stored.max()) // 128)
        return torch.empty(*lines, most, device="meta"), torch.empty(lines, device="meta")

    def append(self, pages: Any, batch: Any, key: Any, value: Any) -> None:
        self._check("append", pages, key, value, *batch.device_counts)

    def read(
        self, pages: Any, batch: Any, key: Any, value: Any, index: Any = None, start: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if index is None:
            index = all_tokens(batch.host)[0].expand(self.heads, -1).to(pages.device)
        self._check("read", pages, index, *batch.device_counts)
        shape = 2, *index.shape, SIZE
        key, value = torch.empty(shape, device=pages.device)
        return key, value

    def write(
        self, pages: Any, batch: Any, index: Any, key: Any, value: Any, start: Any = None
    ) -> None:
        self._check("write", pages, index, key, value, *batch.device_counts)

    def _check(self, call: str, *tensors: torch.Tensor) -> None:
        assert {x.device.type for x in tensors} == {"meta"}
        self.calls[call] += 1


def _drive(method: str, heads: int, prompt: int, codec: str) -> tuple[Counter[str], Counter[str]]:
    """Two requests on a device without values; returns torch's operators and the kernel's calls."""
    compactor._sketch.cache_clear()
    kernel, guard = Nothing(heads), Guard()
    layout = layouts(parse(codec), SIZE, 128, torch.float32)[0]
    drive(layer_of(kernel, layout, heads), [method, method], prompt, guard)
    return guard.seen, kernel.calls


@pytest.mark.parametrize("codec", ["raw", "kivi-4bit"])
@pytest.mark.parametrize("method", METHODS)
def test_everything_is_made_where_the_pages_are(method: str, codec: str) -> None:
    """And no loop runs over heads: eight of them take the operators of two."""
    few, calls = _drive(method, 2, PROMPT, codec)
    many, _ = _drive(method, 8, PROMPT, codec)
    assert few == many
    assert calls["attend"]
    if method.split("(", maxsplit=1)[0] in retention_methods():
        assert calls["write"], "nothing was cut"
        assert calls["write"] < calls["append"]


@pytest.mark.parametrize("name", retention_methods())
def test_no_loop_runs_over_tokens(name: str) -> None:
    short, long = (
        _drive(one_method(name), 2, prompt, "raw")[0] for prompt in (2 * PROMPT, 4 * PROMPT)
    )
    assert short == long
