from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from loadtest.commands.process import Server, running_server
from tests.engine.programs import MARK

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "2",
}
PROGRAM_SECONDS = 400
_INTERPRETED = {
    "TRITON_INTERPRET": "1",
    "PYTHONPATH": str(Path(__file__).with_name("interpreter")),
}
# vLLM's V2 model runner, on a machine without a GPU; V1 is what the CPU platform takes.
RUNNERS = {"v2": _INTERPRETED, "v2-async": {**_INTERPRETED, "KVTHRIFT_ASYNC": "1"}}
Program = Callable[..., Any]
CHUNKED = ["--max-num-batched-tokens", "512", "--enable-prompt-embeds"]
FLAGS = ["--enforce-eager", "--max-model-len", "2048", "--kv-cache-memory-bytes", "67108864"]


class Programs:
    """A process of ``tests.engine.programs``, which runs one engine after the other."""

    def __init__(self, log: Path, environment: dict[str, str]) -> None:
        self.log = log
        with log.open("a") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.engine.programs"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env={**os.environ, **ENVIRONMENT, **environment},
            )  # fmt: skip

    def run(self, name: str, arguments: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        limit = threading.Timer(PROGRAM_SECONDS, self.process.kill)
        limit.start()
        try:
            self.process.stdin.write(json.dumps([name, arguments]) + "\n")
            self.process.stdin.flush()
            for line in self.process.stdout:
                if line.startswith(MARK):
                    done = json.loads(line.removeprefix(MARK))
                    assert "error" not in done, done["error"]
                    return done["result"]
            raise AssertionError(f"{name} ended its process:\n{self.log.read_text()[-3000:]}")
        except BaseException:  # what it left behind, or a late answer, must not reach the next
            self.process.kill()
            self.process.wait()
            raise
        finally:
            limit.cancel()

    def stop(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """Run a program of ``tests.engine.programs`` and return its result.

    Those of a model runner share a process, which imports vLLM once; but for those with another
    environment, and those whose engine must not start, of which vLLM and torch leave pieces behind.
    """
    folder = tmp_path_factory.mktemp("programs")
    shared: dict[str, Programs] = {}
    names = {json.dumps(environment): name for name, environment in RUNNERS.items()}

    def run(name: str, environment: dict[str, str] | None = None, **arguments: Any) -> Any:
        runner = names.get(json.dumps(environment)) if environment else "v1"
        if runner is None or name.startswith("refused"):
            own = Programs(folder / name, environment or {})
            try:
                return own.run(name, arguments)
            finally:
                own.stop()
        if runner not in shared or shared[runner].process.poll() is not None:
            shared[runner] = Programs(folder / runner, environment or {})
        return shared[runner].run(name, arguments)

    yield run
    for process in shared.values():
        process.stop()


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
    arguments = ["smollm2-135m", "--cache-policy", "kivi-4bit", *FLAGS, *CHUNKED]
    arguments += ["--policy-alias", "fast=snapkv(budget=96)", "--max-request-bytes", "200000"]
    arguments += ["--enable-scale-out"]  # rendering, and generating from tokens
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
