from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
import transformers
from typer.testing import CliRunner

from cache_policies.errors import PolicyError
from cache_policies.pages.codecs import CODECS
from cache_policies.policy import parse
from server.capacity import bytes_by_length, capacity
from server.cli import app
from server.model_shape import ModelShape
from server.models import ModelError, get_model, model_path, resolve
from tests.engine.tiny_models import FAMILIES
from tests.engine.tiny_rwkv import RWKV5
from tests.engine.tiny_rwkv7 import RWKV7

if TYPE_CHECKING:
    from pathlib import Path

SMOLLM2 = ModelShape(layers=30, num_kv_heads=3, head_size=64, dtype=torch.float32)


@pytest.mark.parametrize(
    ("policy", "ratio"), [("kivi-2bit", 4.5), ("kivi-4bit", 2.9), ("flexgen-4bit", 3.1)]
)
def test_capacity_at_8k_against_16_bit_with_the_ring(policy: str, ratio: float) -> None:
    result = capacity(parse(policy), SMOLLM2, 2**30, 8192)
    assert result.ratio >= ratio
    half = capacity(parse("fp16"), SMOLLM2, 2**30, 8192)
    assert result.requests >= int(half.requests * ratio)


def test_bytes_per_token_of_smollm2() -> None:
    assert capacity(parse("fp16"), SMOLLM2, 2**30, 8192).bytes_per_token == 30 * 3 * 64 * 4
    assert capacity(parse("kivi-2bit"), SMOLLM2, 2**30, 8192).bytes_per_token == 30 * 3 * 48


def test_edge_layers_count_with_their_own_bytes() -> None:
    found = capacity(parse("kivi-2bit+layers(first=2,last=2,codec=fp16)"), SMOLLM2, 2**30, 8192)
    assert found.bytes_per_token == 26 * 3 * 48 + 4 * 3 * 256
    with pytest.raises(PolicyError, match="takes all of the model's 30 layers"):
        capacity(parse("kivi-2bit+layers(first=20,last=10)"), SMOLLM2, 2**30, 8192)


@pytest.mark.parametrize("text", ["fp16", "kivi-2bit", "kivi-4bit", "snapkv(budget=512)+kivi-4bit"])
def test_bytes_are_a_constant_and_a_slope(text: str) -> None:
    policy = parse(text)
    constant, slope = bytes_by_length(policy, SMOLLM2)
    for tokens in (4096, 8192, 65536):
        found = capacity(policy, SMOLLM2, 2**30, tokens).request_bytes
        assert constant + slope * tokens == pytest.approx(found)
    per_token = capacity(policy, SMOLLM2, 2**30, 8192).bytes_per_token
    assert slope == (0 if "budget" in text else per_token)
    assert constant >= 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 320}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    return tmp_path


def test_the_policies_command_lists_every_policy(folder: Path) -> None:
    result = CliRunner().invoke(app, ["policies", "--model", str(folder)], env={"COLUMNS": "220"})
    assert result.exit_code == 0
    assert all(name in result.output for name in CODECS)
    # head size 80: the default group of 32 does not divide it, and the table says so
    assert "divide" in result.output
    constant, slope = bytes_by_length(parse("fp16"), ModelShape(2, 4, 80, torch.float32))
    assert f"{constant:,.0f} + {slope:,.0f} n" in result.output


@pytest.mark.parametrize(
    ("option", "error"),
    [
        (("--memory", "12"), PolicyError),
        (("--memory", "²G"), PolicyError),  # a digit by name, and no number
        (("--dtype", "int8"), PolicyError),
        (("--model", "no-such-model"), ModelError),
    ],
)
def test_bad_options_are_refused(folder: Path, option: tuple[str, str], error: type) -> None:
    result = CliRunner().invoke(app, ["policies", "--model", str(folder), *option])
    assert isinstance(result.exception, error)


@pytest.mark.parametrize("content", ["[]", "{", "{}", '"x"'])
def test_a_configuration_that_describes_no_model_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    result = CliRunner().invoke(app, ["policies", "--model", str(tmp_path)])
    assert isinstance(result.exception, ModelError)
    assert "config.json describes no model" in str(result.exception)


def test_embedded_models_are_known_by_name_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVTHRIFT_CACHE", str(tmp_path))
    assert model_path("smollm2-135m") == tmp_path / "models" / "smollm2-135m"
    assert resolve("org/some-model") == "org/some-model"
    with pytest.raises(ModelError, match="known: smollm2-135m, gemma3-270m"):
        get_model("nix")


def test_a_budget_counts_the_pages_kept_after_the_prompt() -> None:
    shape = ModelShape(layers=30, num_kv_heads=3, head_size=64, dtype=torch.float32)
    full = capacity(parse("fp16"), shape, 1 << 30, 8192)
    kept = capacity(parse("snapkv(budget=1024)+fp16"), shape, 1 << 30, 8192)
    both = capacity(parse("snapkv(budget=1024)+kivi-4bit"), shape, 1 << 30, 8192)
    assert kept.requests == 8 * full.requests + 5  # 64 pages and 8 of them, in 364
    assert kept.ratio == 8
    assert both.ratio == pytest.approx(64 / 12 * 3.2, rel=0.01)  # four ring pages


@pytest.mark.parametrize(
    ("family", "layers", "constant"),
    [
        # a token of a layer: 512 bytes; a window of 256 tokens touches three pages of 128
        ("gemma3", 2, 4 * 384 * 512),
        ("llama4", 1, 3 * 256 * 512),
        # convolution of 4, of heads x width + 2 groups x state channels; heads x width x state
        ("granite4", 2, 2 * 4 * (3 * (8 * 32 + 2 * 16) + 8 * 32 * 16)),
        ("falcon-h1", 2, 2 * 4 * (3 * (4 * 32 + 2 * 16) + 4 * 32 * 16)),
        ("qwen3-next", 1, 3 * 4 * (3 * (2 * 2 * 128 + 4 * 128) + 4 * 128 * 128)),
        ("jamba", 2, 2 * 4 * (3 * 256 + 256 * 16)),
    ],
)
def test_what_grows_and_what_does_not(
    tmp_path: Path, family: str, layers: int, constant: int
) -> None:
    name, arguments = FAMILIES[family]
    getattr(transformers, name)(**arguments).save_pretrained(tmp_path)
    shape = ModelShape.from_folder(tmp_path, torch.float32)
    assert (shape.layers, shape.constant_bytes) == (layers, constant)


@pytest.mark.parametrize(
    ("fast_bfloat16", "settled", "recurrent"),
    [(True, "auto", 4), (False, "auto", 2), (True, "bfloat16", 2), (False, "float32", 4)],
)
def test_states_have_the_dtype_that_vllm_chooses_on_this_cpu(
    monkeypatch: pytest.MonkeyPatch, fast_bfloat16: bool, settled: str, recurrent: int
) -> None:
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: fast_bfloat16)
    name, arguments = FAMILIES["qwen3-next"]
    shape = ModelShape.of(getattr(transformers, name)(**arguments), torch.bfloat16, settled)
    layer = 2 * 3 * (2 * 2 * 128 + 4 * 128) + recurrent * 4 * 128 * 128
    assert shape.constant_bytes == 3 * layer


def test_constant_bytes_count_for_every_request() -> None:
    shape = ModelShape(layers=2, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)
    beside = replace(shape, constant_bytes=8192 * 4 * 64 * 2)  # as much as grows in 16 bit
    alone, both = (capacity(parse("fp16"), s, 1 << 30, 8192) for s in (shape, beside))
    assert both.requests == alone.requests // 2
    assert alone.ratio == both.ratio == 1
    assert capacity(parse("kivi-4bit"), beside, 1 << 30, 8192).ratio < 1.6


@pytest.mark.parametrize(
    ("kind", "options", "state"),
    [
        # published sizes: mamba-2.8b, falcon-mamba-7b (its expand says 16), mamba2-2.7b
        ("Mamba", {"hidden_size": 2560}, 3 * 5120 * 2 + 5120 * 16 * 4),
        ("FalconMamba", {"hidden_size": 4096, "intermediate_size": 8192, "expand": 16},
         3 * 8192 * 2 + 8192 * 16 * 4),
        ("Mamba2", {"hidden_size": 2560, "num_heads": 80, "n_groups": 1},
         3 * (5120 + 2 * 128) * 2 + 80 * 64 * 128 * 4),
    ],
)  # fmt: skip
def test_a_model_without_attention_is_a_constant(
    kind: str, options: dict[str, int], state: int
) -> None:
    config = getattr(transformers, f"{kind}Config")(**options, num_hidden_layers=10)
    shape = ModelShape.of(config, torch.bfloat16, "float32")
    assert (shape.layers, shape.constant_bytes) == (0, 10 * state)
    for text in ("fp16", "kivi-2bit", "snapkv(budget=512)+kivi-4bit"):
        assert bytes_by_length(parse(text), shape) == (10 * state, 0)
        found = capacity(parse(text), shape, 100 * state, 8192)
        assert (found.requests, found.bytes_per_token, found.ratio) == (10, 0, 1)
    with pytest.raises(PolicyError, match="no layers with a cache"):
        capacity(parse("fp16"), replace(shape, constant_bytes=0), 2**30, 8192)


def test_rwkv5_is_a_constant(tmp_path: Path) -> None:
    """Published sizes; the file says a head's size where the number of heads is meant."""
    text = {**RWKV5, "hidden_size": 2048, "attention_hidden_size": 2048, "num_hidden_layers": 24}
    (tmp_path / "config.json").write_text(json.dumps(text))
    shape = ModelShape.from_folder(tmp_path, torch.bfloat16)
    assert (shape.layers, shape.constant_bytes) == (0, 24 * (32 * 64 * 64 * 4 + 2 * 2048 * 2))


def test_rwkv7_is_a_constant(tmp_path: Path) -> None:
    """Of RWKV7-Goose-World3-1.5B."""
    text = {**RWKV7, "hidden_size": 2048, "num_hidden_layers": 24, "intermediate_size": 8192}
    (tmp_path / "config.json").write_text(json.dumps(text))
    shape = ModelShape.from_folder(tmp_path, torch.bfloat16)
    assert (shape.layers, shape.constant_bytes) == (0, 24 * (32 * 64 * 64 * 4 + 2 * 2048 * 2))


def test_recurrent_gemma_is_windows_and_states() -> None:
    config = transformers.RecurrentGemmaConfig(num_key_value_heads=1)  # recurrentgemma-2b
    shape = ModelShape.of(config, torch.bfloat16)
    windows, states = 8 * 2 * 256 * 2 * 2176, 18 * (3 * 2560 * 2 + 2560 * 4)
    assert (shape.layers, shape.constant_bytes) == (0, windows + states)


def test_the_policies_command_knows_models_without_attention(tmp_path: Path) -> None:
    transformers.MambaConfig(num_hidden_layers=2, hidden_size=320).save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["policies", "--model", str(tmp_path)], env={"COLUMNS": "220"})
    assert result.exit_code == 0
    assert f"{2 * (3 * 640 * 4 + 640 * 16 * 4):,} + 0 n" in result.output
    assert "no layer grows" in result.output
