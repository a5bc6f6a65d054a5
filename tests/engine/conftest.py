from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import openai
import pytest

from loadtest.process import Server, running_server
from tests.engine.programs import MARK

if TYPE_CHECKING:
    from pathlib import Path

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "2",
}
Program = Callable[..., Any]
FLAGS = ["--enforce-eager", "--max-model-len", "2048", "--kv-cache-memory-bytes", "67108864"]


@pytest.fixture(scope="session")
def program() -> Program:
    """Run a program of ``tests.engine.programs`` in its own process and return its result."""

    def run(name: str, environment: dict[str, str] | None = None, **arguments: Any) -> Any:
        done = subprocess.run(
            [sys.executable, "-m", "tests.engine.programs", name],
            input=json.dumps(arguments), capture_output=True, text=True, timeout=400, check=False,
            env={**os.environ, **ENVIRONMENT, **(environment or {})},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        line = next(x for x in done.stdout.splitlines() if x.startswith(MARK))
        return json.loads(line.removeprefix(MARK))

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama of two layers, 4 query and 2 KV heads of 64: fast, and divisible by two."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
        initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {chr(300 + i): i for i in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the embedded model under kivi-4bit, for all tests that only ask it."""
    assert smollm2.exists()
    log = tmp_path_factory.mktemp("server") / "log"
    arguments = ["smollm2-135m", "--cache-policy", "kivi-4bit", *FLAGS]
    arguments += ["--policy-alias", "fast=snapkv(budget=96)", "--max-request-bytes", "200000"]
    with running_server(arguments, log) as running:
        yield running


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def long_answer(url: str, key: str) -> Any:
    """A completion that takes seconds."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)
    return client.completions.create(
        model="smollm2-135m", prompt="Hello", max_tokens=100, extra_body={"ignore_eos": True}
    )


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The embedded model; fetched into the user's cache on the first run."""
    from server.models import get_model

    return get_model("smollm2-135m")
