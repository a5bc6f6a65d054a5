"""What is compiled as an engine starts is all that its requests launch, and says what fails."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import triton

from cache_policies.errors import PolicyError
from cache_policies.kernels.contract import Batch, Shape
from cache_policies.kernels.triton import page, warm
from cache_policies.kernels.triton.kernel import TritonKernel
from cache_policies.kernels.triton.warm import warm_up
from cache_policies.pages.codecs.packing import PLANES
from cache_policies.pages.plan import Plan
from cache_policies.policy import parse
from cache_policies.policy.layouts import layouts
from tests.cache_policies.meta import GROUP, METHODS, PROMPT, drive, layer_of, tokens_of
from tests.cache_policies.worker import SCALE, SIZE

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels that are interpreted are not compiled", allow_module_level=True)

from tests.kernels.triton.absent import NAME, absent_gpu
from tests.kernels.triton.aot import SHARED, TARGETS
from tests.kernels.triton.setup import ALL

if TYPE_CHECKING:
    from cache_policies.pages.layout import PageLayout
    from cache_policies.step.cut import Layer

HEADS = 2
SAMPLES = (8,)
POLICIES = (
    "kivi-4bit", "flexgen-4bit", "rotated-3bit", "int8", "raw", "kivi-2bit+layers(codec=fp16)",
)  # fmt: skip


def layout_of(policy: str, dtype: torch.dtype = torch.bfloat16) -> PageLayout:
    """Pages of a policy's edge layers, if it has some."""
    parsed = parse(policy)
    return layouts(parsed, SIZE, 128, dtype, PLANES)[parsed.edges is not None]


def shape_of(*, learned: bool = False, **options: Any) -> Shape:
    """``learned``: with sinks, in the model's type, and an offset of keys."""
    if learned:
        offset = torch.empty(HEADS, SIZE, device="meta")
        sinks = torch.empty(GROUP * HEADS, dtype=torch.bfloat16, device="meta")
        options = {"sinks": sinks, "key_offset": offset}
    return Shape(GROUP * HEADS, HEADS, SCALE, **options)


def plain_steps(layer: Layer) -> None:
    """Requests without a method, of all kinds of lengths."""
    plan = Plan.of(layer.layout)
    for before, fresh in (
        ([0], [1]), ([0, 0], [1, 16]), ([128], [1]), ([1000, 5, 640], [1, 1, 130]), ([4111], [512]),
    ):  # fmt: skip
        start = torch.tensor([0, *fresh], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        computed = torch.tensor(before, dtype=torch.int32).numpy()
        table = torch.empty(len(fresh), 60, dtype=torch.int32, device="meta")
        batch, tokens = Batch.of(plan, start.numpy(), computed, table), tokens_of(layer, sum(fresh))
        layer.kernel.attend(layer.pages, batch, *tokens, torch.empty_like(tokens.query))
        layer.kernel.append(layer.pages, batch, tokens.key, tokens.value)


def large(layer: Layer) -> Layer:
    """With as many pages as an engine has."""
    count = (3 << 30) // layer.pages[0].nbytes
    layer.pages = layer.pages.new_empty(count, *layer.pages.shape[1:])
    return layer


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
@pytest.mark.parametrize("policy", POLICIES)
def test_requests_compile_nothing_that_was_not_compiled_at_start(
    policy: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = absent_gpu(monkeypatch, TARGETS[target])
    layout, shape = layout_of(policy), shape_of()
    kernels = warm_up([(layout, shape)], SAMPLES)
    assert kernels == len(gpu.compiled) <= 36
    layer = large(layer_of(TritonKernel(layout, shape), layout, HEADS))
    plain_steps(layer)
    for number, method in enumerate(METHODS):
        drive(layer, [method, METHODS[number - 7]], PROMPT)
    assert gpu.compiled[kernels:] == []


@pytest.mark.parametrize("policy", POLICIES)
def test_an_engine_whose_requests_choose_no_method_compiles_few_kernels(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = absent_gpu(monkeypatch, TARGETS["sm_80"])
    layout, shape = layout_of(policy), shape_of()
    kernels = warm_up([(layout, shape)], None)
    assert kernels == len(gpu.compiled) <= 6
    layer = layer_of(TritonKernel(layout, shape), layout, HEADS)
    plain_steps(layer)
    assert gpu.compiled[kernels:] == []
    drive(layer, ["snapkv(budget=128)"], PROMPT)
    assert gpu.compiled[kernels:], "this one's are not among them"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("policy", ["kivi-4bit", "rotated-3bit"])
def test_learned_sinks_and_offsets_of_keys_are_known_at_start(
    policy: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = absent_gpu(monkeypatch, TARGETS["sm_80"])
    layout, shape = layout_of(policy, dtype), shape_of(learned=True)
    kernels = warm_up([(layout, shape)], SAMPLES)
    layer = layer_of(TritonKernel(layout, shape), layout, HEADS)
    drive(layer, ["h2o(ratio=0.5,heads=adaptive)", "sparse-prefill(exact=0)"], PROMPT)
    drive(layer, ["knorm(ratio=0.25)", "quest(topk=1,init=128,local=128)"], PROMPT)
    assert gpu.compiled[kernels:] == []


def test_layers_that_are_alike_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, made = absent_gpu(monkeypatch, TARGETS["sm_80"]), []
    record = warm.launches

    def noted(*given: Any) -> Any:
        made.append(given)
        return record(*given)

    monkeypatch.setattr(warm, "launches", noted)
    layer, capped = (layout_of("raw"), shape_of()), (layout_of("raw"), shape_of(soft_cap=50.0))
    kernels = warm_up([layer, layer, layer], None)
    assert len(made) == 1
    assert warm_up([layer], None) == 0, (
        "of another group of layers, or of the cache after the first"
    )
    assert len(made) == 1
    assert warm_up([layer, capped], None) == kernels, "of another kind"
    assert len(made) == 2
    assert len(gpu.compiled) == 2 * kernels


def test_nothing_is_compiled_for_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = absent_gpu(monkeypatch, TARGETS["sm_80"])
    monkeypatch.setattr(warm, "interpreting", lambda: True)
    assert warm_up([(layout_of("raw"), shape_of())], SAMPLES) == 0
    assert not gpu.compiled


def test_a_kernel_that_does_not_compile_is_named_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = absent_gpu(monkeypatch, TARGETS["sm_80"])
    compiles = gpu.compile

    def breaks(source: Any, **options: Any) -> Any:
        if source.fn.__name__ == "mass":
            raise RuntimeError("at 12:8\n  x = tl.dot(q, k)\nPassManager::run failed\n")
        return compiles(source, **options)

    monkeypatch.setattr("triton.compiler.compile", breaks)
    layer = layout_of("kivi-2bit"), shape_of()
    assert warm_up([layer], None) == 5, "mass is not needed"
    for _ in range(2):  # vLLM may ask again
        with pytest.raises(PolicyError) as refused:
            warm_up([layer], SAMPLES)
    assert str(refused.value) == (
        "the Triton kernel mass cannot run for kivi(k_bits=2,v_bits=2,group=32,residual=128) at "
        f"head size 64 (6 query heads over 2 KV heads, torch.bfloat16) on {NAME}: "
        "PassManager::run failed; choose another codec in --cache-policy, or drop it"
    )


def test_a_gpu_that_has_too_little_for_a_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Really compiled: what the GPU lacks is found only when the kernel is loaded."""
    gpu = absent_gpu(monkeypatch, TARGETS["sm_80"], compiles=True)
    gpu.shared = 1000
    layer = layout_of("raw"), shape_of()
    says = f"attend cannot run for raw .* on {NAME}: .*shared memory, .* Hardware limit: 1000"
    for _ in range(2):
        with pytest.raises(PolicyError, match=says):
            warm_up([layer], None)


def test_a_kernel_too_large_for_a_gpu_loses_its_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Really compiled. Requests then launch what was compiled last, and nothing else."""
    absent_gpu(monkeypatch, TARGETS["sm_80"], compiles=True)
    layout, shape, stages = layout_of("raw"), shape_of(), []
    compiles = triton.compiler.compile

    def noted(source: Any, *, options: dict[str, Any], **rest: Any) -> Any:
        kernel = compiles(source, options=options, **rest)
        stages.append((source.fn.__name__, options["num_stages"], kernel.metadata.shared))
        return kernel

    monkeypatch.setattr("triton.compiler.compile", noted)
    warm_up([(layout, shape)], None)
    most = max(shared for _, _, shared in stages)
    assert [number for name, number, shared in stages if shared == most] == [2]
    absent_gpu(monkeypatch, TARGETS["sm_80"], compiles=True).shared = most - 1
    stages.clear()
    warm_up([(layout, shape)], None)
    first = next(at for at, (_, _, shared) in enumerate(stages) if shared == most)
    name, number, shared = stages[first + 1]
    assert (name, number) == (stages[first][0], 1)
    assert shared < most
    kernels = len(stages)
    plain_steps(large(layer_of(TritonKernel(layout, shape), layout, HEADS)))
    assert len(stages) == kernels


@pytest.mark.parametrize("hip", [None, "7.0"])
def test_a_kernel_that_spills_gets_all_registers(
    hip: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On NVIDIA GPUs, where the assembler had left some for more programs at a time."""
    gpu = absent_gpu(monkeypatch, TARGETS["gfx942" if hip else "sm_80"])
    compiles = gpu.compile

    def spills(source: Any, *, options: dict[str, Any], **rest: Any) -> Any:
        kernel, most = compiles(source, options=options, **rest), options.get("maxnreg")
        gpu.compiled[-1] += f" at most {most} registers"
        kernel.n_spills = 4 if source.fn.__name__ == "attend" and most is None else 0
        return kernel

    monkeypatch.setattr("triton.compiler.compile", spills)
    monkeypatch.setattr(torch.version, "hip", hip)
    layout, shape = layout_of("kivi-4bit"), shape_of()
    kernels = warm_up([(layout, shape)], None)
    again = [name for name in gpu.compiled if "at most 255" in name]
    assert len(again) == (0 if hip else 2), "decode and prefill"
    assert len(gpu.compiled) == kernels + len(again)
    plain_steps(large(layer_of(TritonKernel(layout, shape), layout, HEADS)))
    assert len(gpu.compiled) == kernels + len(again), "requests launch what was compiled last"


@pytest.mark.parametrize(
    ("target", "hip", "hides", "precision", "warps"),
    [
        ("sm_90", None, "both", "tf32x3", 8),
        ("sm_100", None, "values", "tf32x3", 8),
        ("gfx942", "7.0", "", "ieee", 4),
    ],
)
def test_each_kind_of_gpu_has_its_form_of_a_launch(
    target: str, hip: str | None, hides: str, precision: str, warps: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(page, "HIDES", True)  # as under Triton 3.7
    absent_gpu(monkeypatch, TARGETS[target])
    monkeypatch.setattr(torch.version, "hip", hip)
    call = next(
        call
        for call in warm.launches(layout_of("kivi-2bit"), shape_of(), None)
        if call.function.__name__ == "attend"
    )
    call = replace(call, options=call.options | {"num_warps": 8})
    here = call.here()
    assert here.constants["PAGE"].hides == hides
    assert here.constants["PAGE"].precision == precision
    assert here.options["num_warps"] == warps
    assert "maxnreg" not in here.options
    assert call.note_spills() is (hip is None)
    assert call.here().options.get("maxnreg") == (None if hip else 255)
    many = replace(call, options=call.options | {"num_warps": 16}).with_all_registers()
    assert many.options["maxnreg"] == 128, "a program of 512 threads cannot have more"


@pytest.mark.skipif(not ALL, reason="nightly")
@pytest.mark.parametrize("policy", POLICIES)
def test_all_kernels_of_a_layer_compile(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = absent_gpu(monkeypatch, TARGETS["sm_80"], compiles=True)
    gpu.shared = SHARED["sm_80"]
    assert warm_up([(layout_of(policy), shape_of())], SAMPLES) in range(29, 37)
