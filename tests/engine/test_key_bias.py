"""Models with large key biases, as Qwen2.5: what is taken away, and what is warned of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
from vllm.utils.torch_utils import set_default_torch_dtype

from cache_policies.policy import parse
from cache_policies.retention.rope import Rope
from cache_policies.vllm_plugin import key_bias

if TYPE_CHECKING:
    from pathlib import Path

    from tests.engine.conftest import Program

HEADS, KV_HEADS, SIZE, LONGEST = 4, 2, 64, 1024
SLOW, FAST = 31, 0  # pairs of channels
FREQUENCY = 1e6 ** (-torch.arange(0, SIZE, 2).double() / SIZE)
ANGLE = torch.arange(LONGEST).double()[:, None] * FREQUENCY
ROPE = Rope(torch.cat([ANGLE.cos(), ANGLE.sin()], 1).float(), SIZE)


def _attention(pair: int, norm: float, monkeypatch: pytest.MonkeyPatch, **parent: object) -> object:
    bias = torch.zeros((HEADS + 2 * KV_HEADS) * SIZE)
    bias[HEADS * SIZE + pair] = norm
    layer = SimpleNamespace(num_heads=HEADS, num_kv_heads=KV_HEADS, head_size=SIZE)
    around = SimpleNamespace(qkv_proj=SimpleNamespace(bias=bias), **parent)
    monkeypatch.setattr(key_bias, "parent_of", lambda _: around)
    monkeypatch.setattr(key_bias, "rope_of", lambda *_: ROPE)
    return layer


CONFIG = SimpleNamespace(model_config=SimpleNamespace(max_model_len=LONGEST))


@pytest.mark.parametrize("codec", ["int8", "flexgen-4bit", "rotated-4bit"])
def test_a_bias_that_hardly_turns_is_taken_away(
    codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = _attention(SLOW, 600.0, monkeypatch)
    offset = key_bias.key_offset(layer, parse(codec).codec, CONFIG)  # type: ignore[arg-type]
    assert offset is not None
    assert offset[0, SLOW] == pytest.approx(600, rel=1e-3)
    assert offset[1].abs().max() == 0
    assert key_bias.turning_norm(key_bias.key_bias(layer), ROPE, LONGEST) < 10  # type: ignore[arg-type]


def test_small_biases_normalized_keys_and_other_codecs_have_no_offset(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rotated, kivi = parse("rotated-4bit").codec, parse("kivi-4bit").codec
    small = _attention(SLOW, 5.0, monkeypatch)
    assert key_bias.key_offset(small, rotated, CONFIG) is None  # type: ignore[arg-type]
    layer = _attention(SLOW, 600.0, monkeypatch)
    assert key_bias.key_offset(layer, kivi, CONFIG) is None  # type: ignore[arg-type]
    layer = _attention(SLOW, 600.0, monkeypatch, k_norm=torch.nn.Identity())
    assert key_bias.key_offset(layer, rotated, CONFIG) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("codec", "pair", "warned"),
    [
        ("kivi-4bit", FAST, True), ("rotated-4bit", FAST, True), ("int8", FAST, True),
        ("kivi-4bit", SLOW, False), ("rotated-4bit", SLOW, False), ("fp16", FAST, False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_turns_is_warned_of(
    codec: str, pair: int, warned: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(key_bias.logger, "warning", lambda text, *given: said.append(text % given))
    layer = _attention(pair, 600.0, monkeypatch)
    with set_default_torch_dtype(dtype):  # the model's, while vLLM loads it
        key_bias.warn_of_bias(layer, parse(codec).codec, CONFIG, 3)  # type: ignore[arg-type]
    assert bool(said) == warned
    if warned:
        assert "layer 3 have a bias of norm 600" in said[0]
        assert codec.split("-", maxsplit=1)[0] in said[0]


@pytest.mark.engine
def test_a_model_with_a_bias_keeps_its_predictions(program: Program, tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=256, hidden_size=256, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=LONGEST,
        initializer_range=0.2, rope_theta=1e6, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.data[SLOW::SIZE] = 400.0
    model.save_pretrained(tmp_path)
    found = program("biased", model=str(tmp_path), policies=["raw", "int8"], longest=LONGEST)
    # 0.17; with the bias left in the scale, whose step is then 400 / 127, it is 3.0.
    assert (torch.tensor(found["int8"]) - torch.tensor(found["raw"])).abs().mean() < 0.5
