"""Models of constant memory: the tokens of transformers, and states that go back to the pool."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
import torch

from loadtest.commands.process import running_server
from server.model_shape import ModelShape
from tests.engine.conftest import FLAGS
from tests.engine.tiny_models import agree, logprobs, make_model

if TYPE_CHECKING:
    from tests.engine.conftest import Program

pytestmark = pytest.mark.engine

FREE = ("mamba", "falcon-mamba", "mamba2")
_random = random.Random(1)
PROMPTS = [[_random.randrange(3, 500) for _ in range(n)] for n in (600, 300, 40)]
CACHED = {"enable_prefix_caching": True, "block_size": 128}  # docs/models.md


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {family: make_model(family, tmp_path_factory.mktemp(family)) for family in FREE}


@pytest.mark.parametrize("family", FREE)
def test_answers_as_transformers_does(
    program: Program, models: dict[str, str], family: str
) -> None:
    got = program("family", model=models[family], policy=None, prompts=PROMPTS, **CACHED)
    assert agree(models[family], PROMPTS, got["tokens"]) == [8] * len(PROMPTS)
    assert got["again"] == got["tokens"]
    assert got["cached"] == [512, 256, 0]  # ends of chunks of 256 tokens
    assert got["free"] == got["total"]
    shape = ModelShape.from_folder(Path(models[family]), torch.float32)
    assert shape.layers == 0
    assert shape.constant_bytes == sum(size * layers for *_, size, layers in got["specs"])


@pytest.mark.parametrize(("family", "policy"), [("mamba", None), ("jamba", "raw")])
def test_answers_in_bfloat16(
    program: Program, tmp_path: Path, family: str, policy: str | None
) -> None:
    """Nearly all tokens of float32: vLLM treats weights of this dtype in another way."""
    folder = make_model(family, tmp_path, torch.bfloat16)
    got = program(
        "family", model=folder, policy=policy, prompts=PROMPTS, dtype="bfloat16", **CACHED
    )
    assert sum(agree(folder, PROMPTS, got["tokens"])) >= 20
    assert got["again"] == got["tokens"]
    assert got["cached"][0] > 0


def test_published_layout_loads(program: Program, tmp_path: Path) -> None:
    """state-spaces/mamba-2.8b-hf but for its number of layers: its names, shapes and dtype."""
    folder = make_model("mamba-2.8b", tmp_path, torch.float32)
    got = program("family", model=folder, policy=None, prompts=PROMPTS[1:], max_model_len=512)
    assert agree(folder, PROMPTS[1:], got["tokens"]) == [8] * 2


def test_samples_logprobs_and_preemption(program: Program, models: dict[str, str]) -> None:
    """Two samples of each request, of the likeliest token, in a pool that cannot hold them all."""
    prompts = [[*PROMPTS[0][i : i + 250]] for i in range(0, 300, 50)]
    got = program(
        "generate", model=models["mamba"], policy=None, prompts=prompts, max_tokens=24,
        sampling={"n": 2, "temperature": 1.0, "top_k": 1}, kv_cache_memory_bytes=14 * 9728 * 3,
        **CACHED,
    )  # fmt: skip
    assert got["preemptions"] > 0
    assert got["free"] == got["total"]
    for prompt, result in zip(prompts, got["results"], strict=True):
        first, second = result["tokens"]
        assert first == second
        theirs, likeliest = logprobs(models["mamba"], prompt, first)
        assert first == likeliest
        assert result["logprobs"][0] == pytest.approx(theirs, abs=1e-3)


def test_a_storm_leaves_every_state_free(program: Program, models: dict[str, str]) -> None:
    result = program(
        "storm", model=models["mamba"], policy=None, requests=80, seed=5, max_model_len=1024,
        kv_cache_memory_bytes=14 * 9728 * 3, methods=[None], longest=600, **CACHED,
    )  # fmt: skip
    assert result["finished"] + result["cancelled"] == 80
    assert result["cancelled"] > 5
    assert result["preemptions"] > 0
    assert result["owned_twice"] == 0
    assert result["leaked"] == 0


def test_a_server_says_what_a_state_takes_and_why_it_has_no_policy(
    models: dict[str, str], tmp_path: Path
) -> None:
    states = ModelShape.from_folder(Path(models["mamba"]), torch.float32).constant_bytes
    arguments = [models["mamba"], *FLAGS, "--dtype", "float32", "--served-model-name", "m"]
    with running_server(arguments, tmp_path / "log") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        asked: dict[str, Any] = {"model": "m", "prompt": PROMPTS[2], "max_tokens": 5}
        held = {
            "policy": "none", "prompt_tokens": 40, "cached_tokens": 0, "computed_tokens": 44,
            "kept_tokens": 0, "pages": 0, "bytes": states, "compression_ratio": None,
        }  # fmt: skip
        more = {"extra_body": {"ignore_eos": True}}
        assert client.completions.create(**asked, **more).usage.kv_cache == held  # type: ignore[union-attr]
        stream = client.completions.create(
            **asked, **more, stream=True, stream_options={"include_usage": True}
        )
        assert list(stream)[-1].usage.kv_cache == held
        with pytest.raises(openai.BadRequestError, match="has no attention"):
            client.completions.create(**{**asked, "model": "m@snapkv"})
        stats = httpx.get(f"{server.url}/v1/cache_policies/stats")
        assert (stats.status_code, "has no attention" in stats.text) == (503, True)
        sizes = httpx.post(f"{server.url}/v1/cache_policies/estimate", json={"policies": ["fp16"]})
        assert sizes.json()["estimates"][0]["constant_bytes"] == states
        assert sizes.json()["estimates"][0]["bytes_per_token"] == 0
        assert "has no attention" in httpx.get(f"{server.url}/policies").text
        assert "vllm:kv_cache_usage_perc" in httpx.get(f"{server.url}/metrics").text
