"""What can be checked of the GPU engine without a GPU: names, refusals, layouts, arguments."""

from __future__ import annotations

import argparse
import json
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
from vllm.config import AttentionConfig
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends import registry
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_layout import KVCacheLayout

from cache_policies.errors import PolicyError
from cache_policies.vllm_plugin import GPU_BACKEND_PATH, register
from cache_policies.vllm_plugin.cuda import (
    BLOCK_SIZE,
    GPU_KERNELS,
    GpuBackend,
    GpuImpl,
    choose_backend,
)
from cache_policies.vllm_plugin.guard import PolicyGuard
from tests.cache_policies.conftest import arguments

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm.config import VllmConfig

pytestmark = pytest.mark.next


@pytest.mark.usefixtures("gpu_platform")
def test_a_gpu_gets_a_backend_of_its_own_name() -> None:
    register()
    assert set(registry._ATTN_OVERRIDES) == {AttentionBackendEnum.CUSTOM}
    assert AttentionBackendEnum.CUSTOM.get_class() is GpuBackend
    assert resolve_obj_by_qualname(GPU_BACKEND_PATH) is GpuBackend
    assert AttentionBackendEnum[GpuBackend.get_name()] is AttentionBackendEnum.CUSTOM


def test_full_attention_layers_get_it_and_other_layers_do_not() -> None:
    given = arguments()
    choose_backend(given)
    assert given.attention_config.backend is None
    kinds = given.attention_config.backend_per_kind
    assert kinds == {"full_attention": AttentionBackendEnum.CUSTOM}
    assert given.block_size == BLOCK_SIZE
    kept = arguments("--block-size", "64")
    choose_backend(kept)
    assert kept.block_size == 64


@pytest.mark.parametrize(
    "flags",
    [
        ("--attention-backend", "FLASH_ATTN"),
        ("--attention-config", '{"backend_per_kind": {"full_attention": "TRITON_ATTN"}}'),
        ("--attention-config", '{"backend": "FLASHINFER"}'),
    ],
)
def test_another_backend_is_refused(flags: tuple[str, ...]) -> None:
    with pytest.raises(PolicyError, match="brings its own attention backend; drop"):
        choose_backend(arguments(*flags))


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_a_kernel_for_cpus_is_refused(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for allowed in (None, *GPU_KERNELS):
        choose_backend(argparse.Namespace(**vars(arguments()), cache_kernel=allowed))
    with pytest.raises(PolicyError, match=f"{kernel} is not for GPUs; choose one of auto, triton"):
        choose_backend(argparse.Namespace(**vars(arguments()), cache_kernel=kernel))
    extra = {"cache_policy": "raw", "cache_kernel": kernel}
    with pytest.raises(PolicyError, match="is not for GPUs"):
        choose_backend(arguments("--additional-config", json.dumps(extra)))
    config = SimpleNamespace(additional_config=extra)  # of a script, which comes by no command
    monkeypatch.setattr("cache_policies.vllm_plugin.cuda.get_current_vllm_config", lambda: config)
    with pytest.raises(PolicyError, match="is not for GPUs"):
        GpuImpl(4, 64, 0.125, 2)


def test_vllm_finds_the_configurations_valid_that_the_codecs_take() -> None:
    given = {
        "kv_cache_dtype": "auto", "use_mla": False, "has_sink": False, "use_sparse": False,
        "use_mm_prefix": False, "use_per_head_quant_scales": False, "device_capability": None,
        "attn_type": "decoder",
    }  # fmt: skip
    for head_size in (64, 80, 96, 128, 256):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            reasons = GpuBackend.validate_configuration(
                head_size=head_size, dtype=dtype, block_size=128, **given
            )
            assert reasons == []
    learned = given | {"has_sink": True}
    assert not GpuBackend.validate_configuration(
        head_size=64, dtype=torch.bfloat16, block_size=128, **learned
    )
    own = given | {"kv_cache_dtype": "bfloat16"}  # what undoes a checkpoint that asks for fp8
    assert not GpuBackend.validate_configuration(
        head_size=64, dtype=torch.bfloat16, block_size=128, **own
    )
    for wrong in ({"head_size": 112}, {"block_size": 16}, {"kv_cache_dtype": "fp8"}):
        asked = {"head_size": 64, "dtype": torch.float16, "block_size": 128} | given | wrong
        assert GpuBackend.validate_configuration(**asked), wrong


def _page_view(layout: KVCacheLayout) -> torch.Tensor:
    """A layer's pages [blocks, heads, tokens, bytes] in memory laid out so, as vLLM views them."""
    logical = (3, 5, 2, 32, 96)  # layers, blocks, heads, tokens, bytes
    physical = torch.zeros([logical[i] for i in layout.stride_order], dtype=torch.uint8)
    back = [layout.stride_order.index(i) for i in range(5)]
    return physical.permute(back)[1]


@pytest.mark.parametrize("layout", list(KVCacheLayout))
def test_pages_are_viewed_not_copied_in_the_layouts_we_declare(layout: KVCacheLayout) -> None:
    view = _page_view(layout)
    pages = view.flatten(2)
    shared = pages.untyped_storage().data_ptr() == view.untyped_storage().data_ptr()
    assert shared == (layout in GpuBackend.supported_kv_cache_layouts())


def test_the_name_without_a_policy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = type("Config", (), {"additional_config": {}})()
    monkeypatch.setattr("cache_policies.vllm_plugin.cuda.get_current_vllm_config", lambda: plain)
    with pytest.raises(PolicyError, match="needs a cache policy"):
        GpuImpl(4, 64, 0.125, 2)


def test_the_guard_of_a_worker_lets_the_backend_serve(
    engine_config: Callable[..., VllmConfig],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    config, other = engine_config(chosen=True), engine_config(chosen=False)
    request.getfixturevalue("gpu_platform")
    with pytest.raises(PolicyError, match="vLLM's own"):
        PolicyGuard(config, torch.device("cpu"), False)
    register()
    assert PolicyGuard(config, torch.device("cpu"), False).rows is not None
    with pytest.raises(PolicyError, match="chooses its attention backend itself"):
        PolicyGuard(other, torch.device("cpu"), False)


def test_attention_config_has_the_field_we_set() -> None:
    assert "backend_per_kind" in AttentionConfig.__dataclass_fields__
