"""A worker on a GPU compiles its kernels as vLLM makes the builders, or does not start."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

from cache_policies.errors import PolicyError
from cache_policies.kernels import kernel_class
from cache_policies.kernels.triton import warm
from cache_policies.kernels.triton.kernel import TritonKernel
from cache_policies.vllm_plugin import backend, cuda
from cache_policies.vllm_plugin.backend import RingStoreBackend
from cache_policies.vllm_plugin.cuda import GpuBackend
from tests.cache_policies.gpu import CPU, layer, planning, spec_of, window

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels that are interpreted are not compiled", allow_module_level=True)

from tests.kernels.triton.absent import NAME, absent_gpu
from tests.kernels.triton.aot import TARGETS

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm.config import VllmConfig
    from vllm.model_executor.layers.attention import Attention

    from tests.kernels.triton.absent import AbsentGpu

pytestmark = pytest.mark.next


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> AbsentGpu:
    """One on which a worker takes Triton's kernels, and torch finds none."""
    for module in (backend, cuda):
        monkeypatch.setattr(module, "kernel_class", lambda _: TritonKernel)
    return absent_gpu(monkeypatch, TARGETS["sm_90"])


def start(layers: list[Attention], config: VllmConfig, builders: Any = GpuBackend) -> None:
    """What vLLM does with layers that are alike; twice, for it profiles graphs first."""
    config.cache_config.num_gpu_blocks = 100
    names, spec = [x.layer_name for x in layers], spec_of(layers[0], config)
    for _ in range(2):
        builders.get_builder_cls()(spec, names, config, CPU)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is recorded to be compiled: pages, shape and samples."""
    found, record = [], warm.launches

    def noted(*given: Any) -> Any:
        found.append(given)
        return record(*given)

    monkeypatch.setattr(warm, "launches", noted)
    return found


def test_kernels_are_compiled_once_for_layers_that_are_alike(
    config: VllmConfig, gpu: AbsentGpu, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    log = SimpleNamespace(info=lambda text, *given: said.append(text % given))
    monkeypatch.setattr(cuda, "logger", log)
    layers = [layer(config, number) for number in range(2)]
    start(layers, config)
    ((layout, shape, samples),) = asked
    assert layers[0].impl.form(layers[0], 128) == (layout, shape)
    assert layout.packing == TritonKernel.packing
    assert samples == {8}
    assert len(said) == 1
    assert said[0].startswith(f"kvthrift: {len(gpu.compiled)} Triton kernels are ready after ")


def test_first_and_last_layers_have_kernels_of_their_own(
    engine_config: Callable[..., VllmConfig], gpu: AbsentGpu, asked: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    config = engine_config(policy="kivi-2bit+layers(first=1,last=0,codec=fp16)")
    layers = [layer(config, number) for number in range(2)]
    for one in layers:
        start([one], config, one.attn_backend)
    assert [str(layout.codec).split("(")[0] for layout, *_ in asked] == ["fp16", "kivi"]
    assert len(gpu.compiled) > 36


def test_a_policys_own_samples_are_compiled_beside_those_that_requests_have_unasked(
    engine_config: Callable[..., VllmConfig], gpu: AbsentGpu, asked: list[Any]
) -> None:
    config = engine_config(policy="sparse-prefill(samples=16)+kivi-4bit")
    start([layer(config, 0), layer(config, 1)], config)
    assert asked[0][2] == {8, 16}
    assert sum(name.startswith("sums ") for name in gpu.compiled) == 4


def test_methods_that_are_refused_are_not_compiled(
    config: VllmConfig, gpu: AbsentGpu, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [layer(config, 0), layer(config, 1)]
    monkeypatch.setattr(type(config.model_config), "is_hybrid", True)  # on the V2 runner
    start(layers, config)
    assert asked[0][2] is None
    assert len(gpu.compiled) == 5


def test_a_worker_whose_gpu_cannot_run_a_kernel_does_not_start(
    config: VllmConfig, gpu: AbsentGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: Any, **__: Any) -> Any:
        raise RuntimeError("ptxas ran out of registers")

    layers = [layer(config, 0), layer(config, 1)]
    monkeypatch.setattr("triton.compiler.compile", breaks)
    says = f"attend cannot run for kivi.* at head size 64 .* on {NAME}: ptxas ran out of registers"
    for _ in range(2):
        with pytest.raises(PolicyError, match=says):
            start(layers, config)
    assert not gpu.compiled


def test_a_cpus_builders_compile_nothing(
    config: VllmConfig, gpu: AbsentGpu, asked: list[Any]
) -> None:
    start([layer(config, number) for number in range(2)], config, RingStoreBackend)
    assert not asked
    assert not gpu.compiled


def test_kernels_for_cpus_are_not_compiled(
    config: VllmConfig, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = absent_gpu(monkeypatch, TARGETS["sm_90"])
    start([layer(config, number) for number in range(2)], config)
    assert kernel_class("auto").name != "triton"
    assert not asked
    assert not absent.compiled


@pytest.mark.parametrize(
    ("name", "windows"),
    [("LBHNC", False), ("BLHNC", False), ("LHBNC", False), ("BHLNC", False), ("BLHNC", True)],
)
def test_pages_lie_where_sixteen_divides(config: VllmConfig, name: str, windows: bool) -> None:
    """In vLLM's memory, as Triton is told at start; else it would compile for them again."""
    layers = [
        window(config, number) if windows and number % 3 else layer(config, number)
        for number in range(6)
    ]
    layout = KVCacheLayout[name]
    assert layout in GpuBackend.supported_kv_cache_layouts()
    specs = {x.layer_name: x.get_kv_cache_spec(config) for x in layers}
    specs = {
        x.layer_name: specs[x.layer_name] if x.sliding_window else spec_of(x, config)
        for x in layers
    }
    config.cache_config.kv_cache_layout = name
    groups = planning.get_kv_cache_groups(config, specs)
    allocated = planning.get_kv_cache_config_from_groups(config, groups, 1 << 27)
    caches = allocate_kv_cache(allocated, torch.device("cpu"), layout)
    for x in layers:
        if not x.sliding_window:
            pages = caches[x.layer_name].flatten(2)
            places = *pages.stride()[:2], pages.data_ptr()
            assert [place % 16 for place in places] == [0, 0, 0]
            assert 1 not in places
