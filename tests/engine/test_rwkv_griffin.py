"""RWKV-5 and RecurrentGemma: the tokens of other implementations, states that go back."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from server.model_shape import ModelShape
from tests.engine.tiny_models import agree, make_model
from tests.engine.tiny_rwkv import RWKV5, agree_rwkv, make_rwkv5

if TYPE_CHECKING:
    from tests.engine.conftest import Program

pytestmark = pytest.mark.engine

_random = random.Random(1)
PROMPTS = [[_random.randrange(3, 500) for _ in range(n)] for n in (600, 300, 40)]
BARE = {"skip_tokenizer_init": True, "enable_prefix_caching": True}
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
def rwkv5(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_rwkv5(tmp_path_factory.mktemp("rwkv5"))


@pytest.fixture(scope="module")
def griffin(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model("recurrent-gemma", tmp_path_factory.mktemp("griffin"))


def run(program: Program, model: str) -> Any:
    """In chunks, together, in a poisoned pool; again with prefix hits at the ends of chunks."""
    got = program("family", model=model, policy=None, prompts=PROMPTS, **BARE)
    assert got["again"] == got["tokens"]
    assert got["cached"] == [512, 256, 0]
    assert got["free"] == got["total"]
    return got


def test_rwkv5_answers_as_its_authors_package(program: Program, rwkv5: str) -> None:
    """From the names of the hub's checkpoints."""
    got = run(program, rwkv5)
    assert agree_rwkv(rwkv5, PROMPTS, got["tokens"]) == [8] * len(PROMPTS)
    shape = ModelShape.from_folder(Path(rwkv5), torch.float32)
    assert shape.constant_bytes == sum(size * layers for *_, size, layers in got["specs"])


def test_recurrent_gemma_answers_as_transformers_does(program: Program, griffin: str) -> None:
    got = run(program, griffin)
    assert agree(griffin, PROMPTS, got["tokens"]) == [8] * len(PROMPTS)
    assert len({*got["tokens"][0]}) > 2  # else a layer might do nothing
    shape = ModelShape.from_folder(Path(griffin), torch.float32)
    states = sum(size * n for name, _, size, n in got["specs"] if name == "MambaSpec")
    window = 2 * 64 * 4 * 384 * sum(n for name, *_, n in got["specs"] if name != "MambaSpec")
    assert shape.constant_bytes == states + window


def test_samples_logprobs_and_preemption(program: Program, tmp_path: Path) -> None:
    """Two samples of each request, of the likeliest token, from the names of the author's files."""
    model = make_rwkv5(tmp_path, published=False)
    prompts = [[*PROMPTS[0][i : i + 250]] for i in range(0, 300, 50)]
    got = program(
        "generate", model=model, policy=None, prompts=prompts, max_tokens=24, **BARE,
        sampling={"n": 2, "temperature": 1.0, "top_k": 1, "detokenize": False},
        kv_cache_memory_bytes=14 * RWKV_BLOCK * 2,
    )  # fmt: skip
    assert got["preemptions"] > 0
    assert got["free"] == got["total"]
    answers = [result["tokens"][0] for result in got["results"]]
    assert agree_rwkv(model, prompts, answers) == [24] * len(prompts)
    for result in got["results"]:
        assert result["tokens"][0] == result["tokens"][1]
        assert result["logprobs"][0] == pytest.approx(result["logprobs"][1], abs=1e-3)


@pytest.mark.parametrize(
    ("family", "memory"), [("rwkv5", 9 * RWKV_BLOCK * 2), ("griffin", 30 * 65536)]
)
def test_a_storm_leaves_every_state_free(
    program: Program, rwkv5: str, griffin: str, family: str, memory: int
) -> None:
    result = program(
        "storm", model={"rwkv5": rwkv5, "griffin": griffin}[family], policy=None, requests=80,
        seed=5, max_model_len=1024, kv_cache_memory_bytes=memory, methods=[None], longest=600,
        **BARE,
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
        {**GRIFFIN, "num_hidden_layers": 3, "vocab_size": 512},
    ],
    ids=["rwkv-5-world-1b5", "recurrentgemma-2b"],
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
