"""RWKV and RecurrentGemma: the tokens of other implementations, states that go back."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from linear_models.convert import convert
from server.model_shape import ModelShape
from tests.engine.tiny_models import agree, logprobs, make_model
from tests.engine.tiny_rwkv import AUTHORS, RWKV5, agree_rwkv, logprobs_rwkv, make_rwkv5
from tests.engine.tiny_rwkv7 import RWKV7, make_rwkv7

if TYPE_CHECKING:
    from tests.engine.conftest import Program

pytestmark = pytest.mark.engine

_random = random.Random(1)
PROMPTS = [[_random.randrange(3, 500) for _ in range(n)] for n in (600, 300, 40)]
BARE = {"skip_tokenizer_init": True, "enable_prefix_caching": True, "block_size": 128}
RWKV_BLOCK = 2 * 64 * 64 * 4 + 2 * 128 * 4  # bytes of a block in one layer, of two
GRIFFIN = {
    "architectures": ["RecurrentGemmaForCausalLM"], "model_type": "recurrent_gemma",
    "_block_types": ["recurrent", "recurrent", "attention"], "attention_bias": False,
    "attention_dropout": 0.0, "attention_window_size": 2048, "conv1d_width": 4,
    "embeddings_scale_by_sqrt_dim": True, "head_dim": 256, "hidden_size": 2560,
    "hidden_activation": "gelu_pytorch_tanh", "intermediate_size": 15360, "logits_soft_cap": 30.0,
    "lru_width": 2560, "num_attention_heads": 10, "num_key_value_heads": 1,
    "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
}  # fmt: skip  # google/recurrentgemma-2b


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """With the names of the hub's checkpoints."""
    return {
        "rwkv5": make_rwkv5(tmp_path_factory.mktemp("rwkv5")),
        "rwkv7": make_rwkv7(tmp_path_factory.mktemp("rwkv7")),
        "griffin": make_model("recurrent-gemma", tmp_path_factory.mktemp("griffin")),
    }


def run(program: Program, model: str) -> Any:
    """In chunks, together, in a poisoned pool; again with prefix hits at the ends of chunks."""
    got = program("family", model=model, policy=None, prompts=PROMPTS, **BARE)
    assert got["again"] == got["tokens"]
    assert got["cached"] == [512, 256, 0]
    assert got["free"] == got["total"]
    assert len({*got["tokens"][0]}) > 2  # else a layer might do nothing
    return got


@pytest.mark.parametrize("family", ["rwkv5", "rwkv7"])
def test_rwkv_answers_as_its_authors_package(
    program: Program, models: dict[str, str], family: str
) -> None:
    model = models[family]
    got = run(program, model)
    assert agree_rwkv(model, PROMPTS, got["tokens"]) == [8] * len(PROMPTS)
    shape = ModelShape.from_folder(Path(model), torch.float32)
    assert shape.constant_bytes == sum(size * layers for *_, size, layers in got["specs"])


def test_recurrent_gemma_answers_as_transformers_does(
    program: Program, models: dict[str, str]
) -> None:
    griffin = models["griffin"]
    got = run(program, griffin)
    assert agree(griffin, PROMPTS, got["tokens"]) == [8] * len(PROMPTS)
    shape = ModelShape.from_folder(Path(griffin), torch.float32)
    states = sum(size * n for name, _, size, n in got["specs"] if name == "MambaSpec")
    window = 2 * 64 * 4 * 384 * sum(n for name, *_, n in got["specs"] if name != "MambaSpec")
    assert shape.constant_bytes == states + window


@pytest.mark.parametrize(
    ("family", "memory"),
    [("rwkv5", 14 * RWKV_BLOCK * 2), ("rwkv7", 14 * RWKV_BLOCK * 2), ("griffin", 30 * 65536)],
)
def test_samples_logprobs_and_preemption(
    program: Program, models: dict[str, str], tmp_path: Path, family: str, memory: int
) -> None:
    """Two samples of each request, of the likeliest token; RWKV from its author's files."""
    model, theirs = models[family], logprobs
    if family != "griffin":
        theirs = logprobs_rwkv
        convert(Path(model) / AUTHORS, tmp_path)
    prompts = [[*PROMPTS[0][i : i + 250]] for i in range(0, 300, 50)]
    got = program(
        "generate", model=model if family == "griffin" else str(tmp_path), policy=None,
        prompts=prompts, max_tokens=24, kv_cache_memory_bytes=memory, dtype="float32", **BARE,
        sampling={"n": 2, "temperature": 1.0, "top_k": 1, "detokenize": False},
    )  # fmt: skip
    assert got["preemptions"] > 0
    assert got["free"] == got["total"]
    for prompt, result in zip(prompts, got["results"], strict=True):
        first, second = result["tokens"]
        assert first == second
        expected, likeliest = theirs(model, prompt, first)
        assert first == likeliest
        assert result["logprobs"][0] == pytest.approx(expected, abs=1e-3)
        assert result["logprobs"][1] == pytest.approx(expected, abs=1e-3)


def test_names_of_older_checkpoints_load(program: Program, tmp_path: Path) -> None:
    """Of RWKV-7, whose mixes were once stacked; their tokens are the author's package's too."""
    model, prompts = make_rwkv7(tmp_path, "old"), PROMPTS[1:]
    got = program(
        "generate", model=model, policy=None, prompts=prompts, max_tokens=8,
        sampling={"detokenize": False}, **BARE,
    )  # fmt: skip
    assert agree_rwkv(model, prompts, [r["tokens"][0] for r in got["results"]]) == [8] * 2


@pytest.mark.parametrize(
    ("family", "memory"),
    [("rwkv5", 9 * RWKV_BLOCK * 2), ("rwkv7", 9 * RWKV_BLOCK * 2), ("griffin", 30 * 65536)],
)
def test_a_storm_leaves_every_state_free(
    program: Program, models: dict[str, str], family: str, memory: int
) -> None:
    result = program(
        "storm", model=models[family], policy=None, requests=80, seed=5, max_model_len=1024,
        kv_cache_memory_bytes=memory, methods=[None], longest=600, **BARE,
    )  # fmt: skip
    assert result["finished"] + result["cancelled"] == 80
    assert result["cancelled"] > 3
    assert result["preemptions"] > 0
    assert result["owned_twice"] == 0
    assert result["leaked"] == 0


@pytest.mark.parametrize(
    "config",
    [
        {**RWKV5, "hidden_size": 2048, "attention_hidden_size": 2048, "num_hidden_layers": 1},
        {
            **RWKV7,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 2,
            "decay_low_rank_dim": 96,
            "a_low_rank_dim": 96,
            "v_low_rank_dim": 64,
            "gate_low_rank_dim": 256,
        },
        {**GRIFFIN, "num_hidden_layers": 3, "vocab_size": 512},
    ],
    ids=["rwkv-5-world-1b5", "RWKV7-Goose-World3-1.5B", "recurrentgemma-2b"],
)
def test_published_configurations_load(
    program: Program, tmp_path: Path, config: dict[str, Any]
) -> None:
    """All but the number of layers and the vocabulary is as published; random weights."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    got = program(
        "generate", model=str(tmp_path), policy=None, prompts=PROMPTS[1:], max_tokens=2,
        dtype="bfloat16", load_format="dummy", sampling={"detokenize": False}, **BARE,
    )  # fmt: skip
    assert [len(r["tokens"][0]) for r in got["results"]] == [2, 2]
