"""What can be checked of the GPU engine without a GPU: names, refusals, layouts, arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from transformers import LlamaConfig
from vllm.config import AttentionConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends import registry
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_layout import KVCacheLayout

from cache_policies.errors import PolicyError
from cache_policies.vllm_plugin import GPU_BACKEND_PATH, register
from cache_policies.vllm_plugin.cuda import BLOCK_SIZE, GpuBackend, GpuImpl, choose_backend
from cache_policies.vllm_plugin.guard import PolicyGuard

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from pathlib import Path

    from vllm.config import VllmConfig


@pytest.fixture
def gpu_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    """A platform that says it is CUDA, and vLLM's registry as it was."""
    platform = type(current_platform)
    monkeypatch.setattr(platform, "is_cpu", lambda *_: False)
    monkeypatch.setattr(platform, "is_cuda_alike", lambda *_: True)
    monkeypatch.setattr(registry, "_ATTN_OVERRIDES", {})


def _arguments(*flags: str) -> argparse.Namespace:
    return EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(list(flags))


@pytest.mark.usefixtures("gpu_platform")
def test_a_gpu_gets_a_backend_of_its_own_name() -> None:
    register()
    assert set(registry._ATTN_OVERRIDES) == {AttentionBackendEnum.CUSTOM}
    assert AttentionBackendEnum.CUSTOM.get_class() is GpuBackend
    assert resolve_obj_by_qualname(GPU_BACKEND_PATH) is GpuBackend
    assert AttentionBackendEnum[GpuBackend.get_name()] is AttentionBackendEnum.CUSTOM


def test_full_attention_layers_get_it_and_other_layers_do_not() -> None:
    arguments = _arguments()
    choose_backend(arguments)
    assert arguments.attention_config.backend is None
    kinds = arguments.attention_config.backend_per_kind
    assert kinds == {"full_attention": AttentionBackendEnum.CUSTOM}
    assert arguments.block_size == BLOCK_SIZE
    kept = _arguments("--block-size", "64")
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
        choose_backend(_arguments(*flags))


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


@pytest.fixture
def engine_config(tmp_path: Path) -> Callable[..., VllmConfig]:
    """An engine's configuration under a policy, of a tiny Llama that is never loaded."""
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaConfig(hidden_size=256, head_dim=64, **shape).save_pretrained(tmp_path)

    def make(*, chosen: bool) -> VllmConfig:
        arguments = _arguments(
            "--model", str(tmp_path), "--skip-tokenizer-init", "--dtype", "float32",
            "--additional-config", '{"cache_policy": "kivi-4bit"}',
        )  # fmt: skip
        if chosen:
            choose_backend(arguments)
        return EngineArgs.from_cli_args(arguments).create_engine_config()

    return make


def test_the_guard_of_a_worker_lets_the_backend_serve(
    engine_config: Callable[..., VllmConfig], request: pytest.FixtureRequest
) -> None:
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
