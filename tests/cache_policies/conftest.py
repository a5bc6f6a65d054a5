"""A GPU's platform and an engine's configuration, on a machine that has neither."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from transformers import LlamaConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backends import registry

from cache_policies.vllm_plugin import frontend, rows
from cache_policies.vllm_plugin.cuda import choose_backend

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from pathlib import Path

    from vllm.config import VllmConfig


def arguments(*flags: str) -> argparse.Namespace:
    return EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(list(flags))


@pytest.fixture
def gpu_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    """A platform that says it is CUDA, and vLLM's registry as it was."""
    platform = type(current_platform)
    monkeypatch.setattr(platform, "is_cpu", lambda *_: False)
    monkeypatch.setattr(platform, "is_cuda_alike", lambda *_: True)
    monkeypatch.setattr(registry, "_ATTN_OVERRIDES", {})


@pytest.fixture
def engine_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., VllmConfig]:
    """An engine's configuration under a policy, of a tiny Llama that is never loaded."""
    # Nothing of it outlives the test.
    monkeypatch.setattr(rows, "_ROWS", {})
    monkeypatch.setattr(frontend, "_engines", [])
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaConfig(hidden_size=256, head_dim=64, **shape).save_pretrained(tmp_path)

    def make(*flags: str, chosen: bool = True, policy: str = "kivi-4bit") -> VllmConfig:
        given = arguments(
            "--model", str(tmp_path), "--skip-tokenizer-init", "--dtype", "float32",
            "--additional-config", f'{{"cache_policy": "{policy}"}}', *flags,
        )  # fmt: skip
        if chosen:
            choose_backend(given)
        return EngineArgs.from_cli_args(given).create_engine_config()

    return make


@pytest.fixture
def config(engine_config: Callable[..., VllmConfig], monkeypatch: pytest.MonkeyPatch) -> VllmConfig:
    """Of an engine on the V2 runner, as a GPU's."""
    made = engine_config()
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")  # vLLM checks for Triton before
    assert made.use_v2_model_runner
    return made
