"""vLLM's attention layers under a GPU's backend: what they hold, declare and refuse."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import vllm
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.layers.attention import Attention, chunked_local_attention
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.utils import (
    get_supported_kv_cache_layouts,
    resolve_kv_cache_layout,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from cache_policies.errors import PolicyError
from cache_policies.vllm_plugin import register
from cache_policies.vllm_plugin.backend import RingStoreBackend
from cache_policies.vllm_plugin.cuda import GpuBackend
from cache_policies.vllm_plugin.guard import PolicyGuard
from cache_policies.vllm_plugin.rotary import rope_of
from tests.cache_policies.gpu import (
    CPU,
    HEADS,
    KV_HEADS,
    SIZE,
    Windows,
    batch,
    builder_of,
    layer,
    planning,
    spec_of,
    window,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm.config import VllmConfig

    from cache_policies.vllm_plugin.builder import RingStoreMetadataBuilder

pytestmark = pytest.mark.next


def _pages(attention: Attention, config: VllmConfig, device: str = "cpu") -> torch.Tensor:
    spec = spec_of(attention, config)
    shape = 40, KV_HEADS, spec.block_size, spec.layout.head_bytes // spec.block_size
    return torch.zeros(shape, dtype=torch.uint8, device=device)


def _run(attention: Attention, builder: RingStoreMetadataBuilder, pages: torch.Tensor) -> None:
    metadata = builder.build(0, batch([5], [5], [0]))
    query, kv = torch.randn(5, HEADS, SIZE), torch.randn(5, KV_HEADS, SIZE)
    attention.impl.forward(attention, query, kv, kv, pages, metadata, torch.empty_like(query))


def test_the_cache_of_graph_profiling_is_let_go_before_the_next_is_made(config: VllmConfig) -> None:
    """vLLM empties ``layer.kv_cache`` only, and then makes builders, and then the real cache."""
    attention = layer(config, 0)
    layer(config, 1)
    pages = _pages(attention, config)
    _run(attention, builder_of(attention, config), pages)
    profiled = weakref.ref(attention.impl._layer.pages)
    del pages
    assert profiled() is not None
    builder = builder_of(attention, config)
    assert profiled() is None
    _run(attention, builder, _pages(attention, config))
    assert attention.impl._layer is not None


def test_vllm_makes_builders_before_it_allocates_a_cache() -> None:
    for file, builders, allocation in (
        ("v1/worker/gpu/model_runner.py", "init_attn_backend(", "init_kv_cache("),
        (
            "v1/worker/gpu_model_runner.py", "self.initialize_metadata_builders(",
            "self.initialize_kv_cache_tensors(",
        ),
    ):  # fmt: skip
        text = (Path(vllm.__file__).parent / file).read_text(encoding="utf-8")
        _, _, body = text.partition("    def initialize_kv_cache(")
        body, *_ = body.partition("\n    def _init_kv_zero_meta")
        assert 0 < body.index(builders) < body.index(allocation), file


def test_a_step_without_metadata_is_answered_with_zeros(config: VllmConfig) -> None:
    attention = layer(config, 0)
    assert attention.impl.kv_cache_dtype == "auto"
    assert attention.impl.dcp_world_size == 1  # vLLM's own constructor has run
    query = torch.full((3, HEADS, SIZE), float("nan"))
    kv = query[:, :KV_HEADS]
    output = attention.impl.forward(attention, query, kv, kv, None, None, query.clone())
    assert not output.any()


# ---- memory layouts


@pytest.mark.parametrize(
    "declared",
    [
        None,  # FlashAttention, Triton
        (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC),  # FlashInfer on sm_100
        (KVCacheLayout.LBNHC, KVCacheLayout.LBHNC, KVCacheLayout.BLHNC),
    ],
)
def test_pages_beside_windows_are_packed_whatever_the_windows_backend_prefers(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch, declared: Any
) -> None:
    """18 layers, every sixth of full attention, as Gemma 3 270M."""
    monkeypatch.setattr(Windows, "declared", declared)
    layers = [layer(config, i) if i % 6 == 5 else window(config, i) for i in range(18)]
    specs = {x.layer_name: x.get_kv_cache_spec(config) for x in layers}
    specs = {
        name: spec_of(x, config) if x.sliding_window is None else spec
        for x, (name, spec) in zip(layers, specs.items(), strict=True)
    }
    names = [x.name for x in get_supported_kv_cache_layouts([Windows, GpuBackend])]
    layout = resolve_kv_cache_layout(config, [names], list(specs.values()))
    assert layout is KVCacheLayout.BLHNC
    groups = planning.get_kv_cache_groups(config, specs)
    block = planning._get_kv_cache_bytes_per_block(groups, layout)
    ours = specs[layers[5].layer_name]
    raw = 3 * 2 * KV_HEADS * SIZE * config.model_config.dtype.itemsize
    assert 3 * ours.page_size_bytes <= block  # three layers of ours lie in one block
    assert block / ours.block_size < 0.4 * raw


def test_without_windows_every_layout_of_ours_is_declared(config: VllmConfig) -> None:
    layer(config, 0)
    assert GpuBackend.supported_kv_cache_layouts()[0] is KVCacheLayout.LBHNC
    assert len(GpuBackend.supported_kv_cache_layouts()) == 4


# ---- layers that a policy would not have


class Own(CPUAttentionBackend):  # type: ignore[misc]
    """A backend that a model names itself."""


def _guard(config: VllmConfig, v2: bool) -> None:
    """Of a worker, up to its first request."""
    guard = PolicyGuard(config, *(["a table"] if v2 else [CPU, False]))
    if not v2:
        guard.update_state(None)


def test_a_layer_that_the_kernels_cannot_serve_ends_the_start(config: VllmConfig) -> None:
    """And is not met by the first request."""
    says = "layer 0: more than 192 query heads share a KV head"
    with set_current_vllm_config(config), pytest.raises(PolicyError, match=says):
        Attention(
            193, SIZE, 1.0, num_kv_heads=1, cache_config=config.cache_config,
            prefix="model.layers.0.self_attn.attn", attn_backend=RingStoreBackend,
        )  # fmt: skip


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize(
    ("made", "policy", "says"),
    [
        ([GpuBackend, GpuBackend], "kivi-4bit", None),
        ([GpuBackend, Windows], "kivi-4bit", None),
        ([Windows, Windows], "kivi-4bit", "is for layers of full attention, and .* has none"),
        ([GpuBackend, Own], "kivi-4bit", "layer 1 of .* has CPU_ATTN; drop the policy"),
        ([GpuBackend, Windows], "kivi-2bit+layers(first=1,last=0)", "layers of another kind"),
    ],
)
def test_a_policy_that_layers_would_not_have_is_refused(
    engine_config: Callable[..., VllmConfig], request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch, v2: bool, made: list[Any], policy: str, says: str | None,
) -> None:  # fmt: skip
    config = engine_config(policy=policy)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(v2)))
    request.getfixturevalue("gpu_platform")
    register()
    layers = [
        window(config, number) if backend is Windows else layer(config, number, backend)
        for number, backend in enumerate(made)
    ]
    if says and made[0] is GpuBackend:  # which is asked for a builder, at start on both
        with pytest.raises(PolicyError, match=says):
            builder_of(layers[0], config)
    if says is None:
        _guard(config, v2)
    else:
        with pytest.raises(PolicyError, match=says):
            _guard(config, v2)


def test_chunked_local_attention_is_refused_by_name(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_local_attention, "get_attn_backend", lambda *_: GpuBackend)
    layer(config, 0)
    with (
        set_current_vllm_config(config),
        pytest.raises(PolicyError, match=r"chunked local attention; layer 1 of .*; drop --cache"),
    ):
        chunked_local_attention.ChunkedLocalAttention(
            HEADS, SIZE, 0.125, 128, num_kv_heads=KV_HEADS, cache_config=config.cache_config,
            prefix="model.layers.1.self_attn.attn",
        )  # fmt: skip


# ---- where things lie


def test_the_rotary_table_is_where_the_pages_are(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotary_embedding, "_ROPE_DICT", {})
    first, second = layer(config, 0), layer(config, 1)
    ropes = [x.impl._make_layer(x, _pages(x, config, device="meta")).rope for x in (first, second)]
    assert ropes[0].table.device.type == "meta"
    assert ropes[0].table is ropes[1].table  # one for all layers
    assert rope_of(first, SIZE, config).table is ropes[0].table  # where nobody asks for a place
    monkeypatch.setattr(config.model_config.hf_text_config, "rope_parameters", {})
    none = first.impl._make_layer(first, _pages(first, config, device="meta")).rope
    assert none.table.shape == (1, 0)
    assert none.table.device.type == "meta"


def test_text_under_m_rope_turns_as_its_table_says(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else biases of keys would be taken for such as do not turn."""
    monkeypatch.setattr(rotary_embedding, "_ROPE_DICT", {})
    text = config.model_config.hf_text_config
    plain = rope_of(layer(config, 0), SIZE, config)
    sections = {**text.rope_parameters, "mrope_section": [8, 12, 12]}
    monkeypatch.setattr(text, "rope_parameters", sections)
    turned = rope_of(layer(config, 1), SIZE, config)
    count = plain.table.shape[0]
    torch.testing.assert_close(turned.table[:count], plain.table)


def test_only_a_cpus_heap_is_trimmed(config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed: list[str] = []
    monkeypatch.setattr(rotary_embedding, "_ROPE_DICT", {})
    monkeypatch.setattr("cache_policies.vllm_plugin.backend._trim_heap", lambda: trimmed.append(""))
    monkeypatch.setattr("cache_policies.vllm_plugin.backend._clock.begins_step", lambda _: True)
    attention = layer(config, 0)
    layer(config, 1)
    builder = builder_of(attention, config)
    _run(attention, builder, _pages(attention, config))
    assert trimmed == [""]
    kernel = attention.impl._kernel_class
    for call in ("attend", "append"):
        monkeypatch.setattr(kernel, call, lambda *_: None)
    _run(attention, builder, _pages(attention, config, device="meta"))
    assert trimmed == [""]
    assert current_platform.is_cpu()


def test_a_window_that_vllm_takes_for_full_attention_is_refused(config: VllmConfig) -> None:
    """As in encoders that hear as they are spoken to."""
    with pytest.raises(PolicyError, match="a layer with a sliding window that vLLM takes for full"):
        layer(config, 0, GpuBackend, per_layer_sliding_window=512)


@pytest.mark.parametrize("backend", [GpuBackend, RingStoreBackend])
def test_prompts_that_attend_in_both_directions_are_refused(
    config: VllmConfig, backend: Any
) -> None:
    """Of a prefix language model: its layers say it in their specs alone."""
    attention = layer(config, 0)
    layer(config, 1)
    spec = replace(attention.get_kv_cache_spec(config), non_causal=True)
    with pytest.raises(PolicyError, match=r"attend in both directions, as .* does"):
        backend.customize_spec(spec)
