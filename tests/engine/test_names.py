"""Names that carry a method, on the routes of a real server; and whose usage is whose."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from loadtest.commands.process import running_server
from loadtest.errors import LoadTestError
from loadtest.measuring.summary import Summary
from loadtest.sending.client import find_target
from tests.engine.asking import MODEL, NOISE, prompt
from tests.engine.conftest import FLAGS

if TYPE_CHECKING:
    from pathlib import Path

    import openai

    from loadtest.commands.process import Server

pytestmark = pytest.mark.engine
SAID = [{"role": "user", "content": "Hello. " + NOISE * 20}]
TEXT = {"prompt": "Hello. " + NOISE * 20, "max_tokens": 2}
CHAT = {"messages": SAID, "max_tokens": 2}
RESPONSE = {"input": SAID[0]["content"], "max_output_tokens": 2}
TOKENS = {"token_ids": list(range(100, 300)), "sampling_params": {"max_tokens": 2}}
# bodies without a model, and how many prompts each gives to the engine
ROUTES: dict[str, tuple[dict[str, Any], int]] = {
    "/v1/completions": (TEXT, 1),
    "/v1/chat/completions": (CHAT, 1),
    "/v1/chat/completions/batch": ({"messages": [SAID, SAID], "max_tokens": 2}, 2),
    "/v1/responses": (RESPONSE, 1),
    "/v1/messages": (CHAT, 1),
    "/inference/v1/generate": (TOKENS, 1),
    "/generative_scoring": (
        {"query": NOISE * 20, "items": [" a", " b"], "label_token_ids": [5, 6]}, 2
    ),
    "/invocations": (TEXT, 1),
    "/v1/messages/count_tokens": (CHAT, 0),
    "/tokenize": ({"prompt": "one two"}, 0),
    "/detokenize": ({"tokens": [100, 101]}, 0),
    "/v1/completions/render": (TEXT, 0),
    "/v1/chat/completions/render": (CHAT, 0),
    "/v1/responses/render": (RESPONSE, 0),
    "/v1/messages/render": (CHAT, 0),
}  # fmt: skip
STREAMED = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages",
            "/inference/v1/generate", "/invocations")  # fmt: skip


def under_snapkv(server: Server) -> int:
    """Requests that have ended under the method."""
    text = httpx.get(f"{server.url}/metrics", timeout=20).text
    lines = [x for x in text.splitlines() if x.startswith("kvthrift_requests_total{")]
    return int(sum(float(x.rsplit(" ", 1)[1]) for x in lines if 'policy="snapkv"' in x))


@pytest.mark.parametrize("name", ["fast", f"{MODEL}@snapkv(budget=96)"])
def test_every_route_takes_every_name(server: Server, name: str) -> None:
    for path, (body, prompts) in ROUTES.items():
        before = under_snapkv(server)
        answer = httpx.post(f"{server.url}{path}", json={"model": name, **body}, timeout=60)
        assert answer.status_code == 200, (path, answer.text)
        assert under_snapkv(server) - before == prompts, path
        if path.endswith("/render"):
            rendered = answer.json()
            first = rendered[0] if isinstance(rendered, list) else rendered
            method = first["sampling_params"]["extra_args"]["cache_policy"]
            assert method == "snapkv(budget=96)", path


def test_streams_end_under_the_method_and_bad_ones_do_not_begin(server: Server) -> None:
    for path in STREAMED:
        body = {"model": "fast", "stream": True, **ROUTES[path][0]}
        before = under_snapkv(server)
        answer = httpx.post(f"{server.url}{path}", json=body, timeout=60)
        assert answer.headers["content-type"].startswith("text/event-stream"), path
        assert '"error"' not in answer.text, path
        assert under_snapkv(server) - before == 1, path
        for wrong in ({"model": f"{MODEL}@h2o(heavy=-1)"}, {"vllm_xargs": {"cache_policy": "h3o"}}):
            answer = httpx.post(f"{server.url}{path}", json={**body, "model": MODEL, **wrong})
            assert answer.status_code == 400, path
            error = answer.json()["error"]
            assert ("heavy=-1" in error["message"]) or ("'h3o'; allowed: all" in error["message"])
            assert ("code" in error) != path.startswith("/v1/messages")


def test_one_model_is_shown_and_the_load_test_finds_it(
    client: openai.OpenAI, server: Server, tmp_path: Path
) -> None:
    assert client.models.retrieve("fast").id == "fast"
    name = f"{MODEL}@snapkv(budget=512)"
    assert client.models.retrieve(name).model_extra["cache_policy"] == "snapkv(budget=512)"  # type: ignore[index]
    assert find_target(server.url, "fast").is_vllm
    assert find_target(server.url, name).longest == 2048
    with pytest.raises(LoadTestError, match="unknown cache policy 'snapvk'"):
        find_target(server.url, f"{MODEL}@snapvk")
    with pytest.raises(LoadTestError, match="does not serve 'slow'"):
        find_target(server.url, "slow")
    command = [sys.executable, "-m", "server", "loadtest", server.url, "--warmup", "0"]
    command += ["-w", "passkey(lengths=300,depths=0.5,digits=7,texts=noise)"]
    for model in ("fast", f"{MODEL}@snapkv(budget=96)"):
        before = under_snapkv(server)
        out = tmp_path / model
        more = ["--model", model, "-o", str(out)]
        done = subprocess.run(
            [*command, *more], capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found = Summary.model_validate_json((out / "summary.json").read_text())
        assert found.requests.ok == under_snapkv(server) - before > 0


def test_two_chats_of_the_same_id_each_say_their_own(server: Server) -> None:
    """The one streams and tells its usage all the way; the other is longer, ends before it."""
    url, header = f"{server.url}/v1/chat/completions", {"X-Request-Id": "mine"}
    options = {"include_usage": True, "continuous_usage_stats": True}
    first = [{"role": "user", "content": "Count."}]
    slow = {"model": MODEL, "messages": first, "max_tokens": 80, "ignore_eos": True, "stream": True,
            "stream_options": options}  # fmt: skip
    begun = threading.Event()

    def stream() -> list[dict[str, Any]]:
        found = []
        with httpx.stream("POST", url, json=slow, headers=header, timeout=120) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    begun.set()
                    found.append(json.loads(line[6:])["usage"])
        return found

    with ThreadPoolExecutor(1) as pool:
        streamed = pool.submit(stream)
        assert begun.wait(60)
        said = [{"role": "user", "content": prompt("other", 60)}]
        other = {"model": "fast", "messages": said, "max_tokens": 2}
        whole = httpx.post(url, json=other, headers=header, timeout=120).json()["usage"]
        usages = streamed.result()
    assert whole["kv_cache"]["prompt_tokens"] == whole["prompt_tokens"] > 400
    assert whole["kv_cache"]["policy"].startswith("snapkv")
    seen = [u["kv_cache"]["prompt_tokens"] for u in usages if "kv_cache" in u]
    assert set(seen) == {usages[-1]["prompt_tokens"]}
    assert "kv_cache" in usages[-1]


def adapter(folder: Path) -> Path:
    """A LoRA adapter of the tiny model that changes next to nothing."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    weights = {}
    for layer in range(2):
        place = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{place}.lora_A.weight"] = torch.full((8, 256), 1e-4)
        weights[f"{place}.lora_B.weight"] = torch.full((256, 8), 1e-4)
    save_file(weights, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"],
             "base_model_name_or_path": "t", "bias": "none", "task_type": "CAUSAL_LM"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder


def test_served_names_with_an_at_and_adapters_take_a_method(tiny: str, tmp_path: Path) -> None:
    poet = adapter(tmp_path / "poet")
    arguments = [tiny, "--cache-policy", "fp16", *FLAGS, "--served-model-name", "team@tiny", "a@b"]
    arguments += ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"poet@1={poet}"]
    arguments += ["--policy-alias", "fast=h2o(heavy=32,recent=32)"]
    ask = {"prompt": list(range(3, 203)), "max_tokens": 2, "return_token_ids": True}
    with running_server(arguments, tmp_path / "log") as running:
        url = f"{running.url}/v1/completions"
        for name, policy in (
            ("team@tiny", "fp16"),
            ("a@b", "fp16"),
            ("poet@1", "fp16"),
            ("fast", "h2o(heavy=32,recent=32)+fp16"),
            ("team@tiny@snapkv(budget=96)", "snapkv(budget=96)+fp16"),
            ("a@b@snapkv(budget=96)", "snapkv(budget=96)+fp16"),
            ("poet@1@snapkv(budget=96)", "snapkv(budget=96)+fp16"),
        ):
            answer = httpx.post(url, json={"model": name, **ask}, timeout=60)
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["kv_cache"]["policy"] == policy
            assert answer.json()["model"] == ("poet@1" if "poet" in name else "team@tiny")
            card = httpx.get(f"{running.url}/v1/models/{name}").json()
            assert card["id"] == name
        twice = httpx.post(url, json={"model": "fast@tova", **ask})
        assert (twice.status_code, "given twice" in twice.text) == (400, True)
        assert httpx.post(url, json={"model": "team@snapkv", **ask}).status_code == 404
