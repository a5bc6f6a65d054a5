"""Names that carry a method, on every route of vLLM's; and what is almost a key of ours."""

from __future__ import annotations

import json
from difflib import get_close_matches
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from cache_policies.errors import PolicyError
from cache_policies.policy import parse, parse_method
from cache_policies.spelling import LIKE, near
from cache_policies.vllm_plugin.config import settings
from server.api.middleware import GENERATING
from server.api.names import ModelNames, parse_aliases
from server.serve import configure, make_parser
from tests.server.fake import Server

if TYPE_CHECKING:
    from fastapi import FastAPI

OURS = ("/v1/cache_policies",)
# routes that do not occupy the engine
LIGHT = {
    "/adapters", "/detokenize", "/inference/v1/abort_requests", "/is_scaling_elastic_ep", "/ping",
    "/scale_elastic_ep", "/tokenize", "/v1/chat/completions/derender",
    "/v1/chat/completions/render", "/v1/completions/derender", "/v1/completions/render",
    "/v1/load_lora_adapter", "/v1/messages/count_tokens", "/v1/messages/render",
    "/v1/responses/render", "/v1/responses/resp_1/cancel", "/v1/unload_lora_adapter",
}  # fmt: skip


def names(**more: Any) -> ModelNames:
    return ModelNames(
        served=["m", "team@model", "a@b@c"], aliases={"fast": "h2o"},
        adapters={"poet": 1, "poet@2": 1}, **more,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("m", None),
        ("fast", ("m", "h2o")),
        ("m@snapkv(budget=512)", ("m", "snapkv(budget=512)")),
        ("team@model", None),
        ("team@model@tova", ("team@model", "tova")),
        ("a@b@c@tova", ("a@b@c", "tova")),
        ("a@b", None),
        ("poet", None),
        ("poet@2", None),
        ("poet@h2o", ("poet", "h2o")),
        ("poet@2@h2o", ("poet@2", "h2o")),
        ("m@h2o@tova", ("m", "h2o@tova")),
        ("nobody@h2o", None),
        ("@h2o", None),
        ("m@", ("m", "")),
        ("", None),
    ],
)
def test_the_longest_known_name_is_taken(name: str, found: tuple[str, str] | None) -> None:
    assert names().resolve(name) == found


def test_a_method_behind_an_alias_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"given twice: 'fast' stands for h2o, and 'tova'"):
        names().resolve("fast@tova")


def test_names_that_vllm_looks_up_on_demand_take_a_method_too() -> None:
    free = names(any_base=True)
    assert free.resolve("later@h2o(heavy=9)") == ("later", "h2o(heavy=9)")
    assert free.resolve("user@host") is None
    assert free.resolve("@h2o") is None


def test_aliases() -> None:
    assert parse_aliases(["a=snapkv( budget = 50 )"], ["m"]) == {"a": "snapkv(budget=50)"}
    for texts, says in (
        (["a"], "is not NAME=METHOD"),
        (["a b=h2o"], "is not NAME=METHOD"),
        (["m@x=h2o"], "is not NAME=METHOD"),
        (["m=h2o"], "is a model name already"),
        (["a=h2o", "a=tova"], "is a model name already"),
        (["a=kivi-4bit"], "cannot choose the codec"),
        (["a=foo"], "unknown cache policy"),
    ):
        with pytest.raises(PolicyError, match=says):
            parse_aliases(texts, ["m"])


@pytest.fixture(scope="module")
def vllm_app() -> FastAPI:
    """vLLM's own application with our routes; no engine behind it."""
    from vllm.entrypoints.launchers.app import build_app

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", "kvthrift")
        patch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
        return build_app(make_parser().parse_args(["x"]), ("generate", "transcription"))


def posts(app: FastAPI) -> list[str]:
    """Paths that take a body."""
    found = [r.path for r in app.routes if "POST" in (getattr(r, "methods", None) or ())]
    return [p.replace("{response_id}", "resp_1") for p in found if not p.startswith(OURS)]


@pytest.mark.next
def test_a_name_becomes_a_model_and_a_method_on_every_route(vllm_app: FastAPI) -> None:
    paths = posts(vllm_app)
    assert len(paths) > 20
    assert {"/v1/responses", "/v1/messages", "/tokenize", "/v1/chat/completions/batch"} < {*paths}
    for path in paths:
        for name in ("fast", "m@snapkv(budget=512)"):
            server = Server()
            server.post({"model": name}, path=path)
            (asked,) = server.asked
            assert asked["model"] == "m", path
            assert server.engine.methods == ["snapkv(budget=512)"], path


@pytest.mark.next
def test_what_occupies_the_engine_is_counted(vllm_app: FastAPI) -> None:
    """A route of vLLM that is in neither list is new: look at what it does."""
    found = {*posts(vllm_app)}
    assert found - {*GENERATING} <= LIGHT
    assert {*GENERATING} - found <= {"/cohere/v2/chat", "/v1/decisions"}  # an option's; 0.33's


@pytest.mark.parametrize("path", ["/v1/systemone", "/v1/decisions"])
def test_a_route_that_refuses_other_fields_gets_none(path: str) -> None:
    server = Server()
    server.post({"model": "m@snapkv(budget=512)", "questions": {}}, path=path)
    assert server.asked == [{"model": "m", "questions": {}}]
    assert server.engine.methods == ["snapkv(budget=512)"]


def test_a_method_reaches_the_engine_where_vllm_has_no_field_for_it() -> None:
    server = Server()
    body = {"model": "m", "sampling_params": {"extra_args": {"cache_policy": "h2o"}}}
    server.post(body, path="/inference/v1/generate")
    assert server.engine.methods == ["h2o"]
    twice = {**body, "vllm_xargs": {"cache_policy": "tova"}}
    assert "given twice" in server.post(twice).json()["error"]["message"]


def test_a_bad_method_is_refused_in_the_form_of_each_api(vllm_app: FastAPI) -> None:
    vllm_app.state.kvthrift.names = names()
    client = TestClient(vllm_app, raise_server_exceptions=False)
    for path in posts(vllm_app):
        for body in (
            {"model": "m@kivi-4bit"},
            {"model": "m", "vllm_xargs": {"cache_policy": "kivi-4bit"}},
        ):
            answer = client.post(path, json={**body, "stream": True})
            assert answer.status_code == 400, path
            content = answer.json()
            assert "cannot choose the codec" in json.dumps(content), path
            if path.startswith("/v1/messages"):
                assert content["type"] == "error"
                assert content["error"]["type"] == "invalid_request_error"
            else:
                assert content["error"]["code"] == 400, path


def test_an_adapter_cannot_take_an_aliass_name(vllm_app: FastAPI) -> None:
    vllm_app.state.kvthrift.names = names()
    client = TestClient(vllm_app)
    body = {"lora_name": "fast", "lora_path": "x"}
    for path, name in (("/v1/load_lora_adapter", "lora_name"), ("/adapters", "name")):
        answer = client.post(path, json={**body, name: "fast"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
    client = TestClient(vllm_app, raise_server_exceptions=False)
    wrong = client.post("/v1/load_lora_adapter", json={**body, "lora_name": ["fast"]})
    assert wrong.status_code in {400, 422}  # vLLM's own


class Models:
    """vLLM's list of models."""

    async def show_available_models(self) -> Any:
        cards = [{"id": n, "max_model_len": 9, "owned_by": "vllm"} for n in ("m", "org/m", "poet")]
        return SimpleNamespace(model_dump=lambda: {"object": "list", "data": cards})


def test_a_model_is_shown_by_any_of_its_names(vllm_app: FastAPI) -> None:
    vllm_app.state.openai_serving_models = Models()
    vllm_app.state.kvthrift.names = ModelNames(
        served=["m", "org/m"], aliases={"fast": "h2o"}, adapters={"poet": 1}
    )
    client = TestClient(vllm_app)

    def card(name: str) -> dict[str, Any]:
        found: dict[str, Any] = client.get(f"/v1/models/{name}").json()
        return found

    assert [c["id"] for c in client.get("/v1/models").json()["data"]] == [
        "m", "org/m", "poet", "fast",
    ]  # fmt: skip
    assert card("m") == {"id": "m", "max_model_len": 9, "owned_by": "vllm"}
    assert card("org/m")["id"] == card("org%2Fm")["id"] == "org/m"
    assert card("fast") == {**card("m"), "id": "fast", "parent": "m", "cache_policy": "h2o"}
    named = card("poet@snapkv( budget=512 )")
    assert (named["parent"], named["cache_policy"]) == ("poet", "snapkv(budget=512)")
    bad = client.get("/v1/models/m@foo")
    assert (bad.status_code, bad.json()["error"]["type"]) == (400, "BadRequestError")
    for unknown in ("n", "n@h2o"):
        gone = client.get(f"/v1/models/{unknown}")
        assert (gone.status_code, gone.json()["error"]["type"]) == (404, "NotFoundError")


@pytest.mark.parametrize(
    "key",
    ["cache_polcy", "cache_polciy", "cachepolicy", "cache-policy", "cachePolicy", "CACHE_POLICY",
     "cache_policies", "cache_policy ", "ache_policy", "cache_kernal"],
)  # fmt: skip
def test_a_key_that_is_almost_ours_is_refused(key: str) -> None:
    server = Server()
    for path in ("/v1/completions", "/v1/responses", "/inference/v1/generate"):
        for body in (
            {"vllm_xargs": {key: "snapkv"}}, {"sampling_params": {"extra_args": {key: "snapkv"}}}
        ):  # fmt: skip
            answer = server.post({"model": "m", **body}, path=path)
            assert answer.status_code == 400
            assert f"no key {key!r}; did you mean 'cache_" in answer.json()["error"]["message"]
    assert not server.asked
    with pytest.raises(PolicyError, match="--additional-config has no key"):
        settings(SimpleNamespace(additional_config={key: "kivi-4bit"}))  # type: ignore[arg-type]
    args = make_parser().parse_args(["x", "--additional-config", json.dumps({key: "kivi-4bit"})])
    with pytest.raises(PolicyError, match="--additional-config has no key"):
        configure(args)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"prompt_compresion": {"method": "selective"}}, "did you mean 'prompt_compression'"),
        ({"vllm_xarg": {"cache_policy": "h2o"}}, "did you mean 'vllm_xargs'"),
        ({"cache_policy": "h2o"}, "belongs into vllm_xargs"),
        ({"cache_polcy": "h2o"}, "cache_policy belongs into vllm_xargs"),
        ({"prompt_compression": []}, "prompt_compression"),
        ({"vllm_xargs": {"cache_kernel": "cpu"}}, "is the server's"),
        ({"vllm_xargs": {"kvthrift_mailbox_slot": 1}}, "kvthrift_mailbox_slot is the scheduler's"),
        ({"vllm_xargs": {"cache_prompt_tokens": 1}}, "cache_prompt_tokens is the scheduler's"),
        ({"vllm_xargs": [1]}, "vllm_xargs must be an object"),
    ],
)
def test_what_would_be_ignored_is_refused(body: dict[str, Any], says: str) -> None:
    server = Server()
    answer = server.post({"model": "m", **body}, path="/v1/chat/completions/batch")
    assert (answer.status_code, says in answer.json()["error"]["message"]) == (400, True)
    assert not server.asked


@given(st.sampled_from(["cache_policy", "vllm_xargs"]), st.data())
def test_what_is_like_ours_is_what_difflib_says(ours: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(ours)))
    name = ours[:start] + data.draw(st.text("cache_polixrgs-A", max_size=8)) + ours[start + 2 :]
    close = get_close_matches(name.lower(), [ours], n=1, cutoff=LIKE)
    assert near(name, [ours]) == (None if name == ours or not close else ours)


def test_compression_is_refused_where_it_is_not_done() -> None:
    server = Server()
    body = {"model": "m", "prompt_compression": {"method": "selective"}}
    answer = server.post(body, path="/v1/responses")
    assert answer.status_code == 400
    assert "/v1/chat/completions" in answer.json()["error"]["message"]


def test_other_keys_are_left_alone(vllm_app: FastAPI) -> None:
    ours = ("cache_policy", "cache_kernel", "prompt_compression", "vllm_xargs")
    fields = {
        name
        for schema in vllm_app.openapi()["components"]["schemas"].values()
        for name in schema.get("properties", ())
    }
    assert len(fields) > 300
    assert not [name for name in fields if near(name, ours)]
    body = {"model": "m", "vllm_xargs": {"session_id": "x", "policy": "y", "cache_salt": "z"}}
    assert Server().post(body).status_code == 200


@pytest.mark.parametrize("flag", ["--cache-polcy", "--cache_polcy", "--policy-alais"])
def test_a_flag_that_is_almost_ours_is_an_error(flag: str) -> None:
    with pytest.raises(SystemExit):
        make_parser().parse_args(["x", flag, "kivi-4bit"])


def test_a_refused_method_lists_no_codec() -> None:
    for text in ("foo", "snapkv(", "", "kivi-4bit", "layers", "snapkv+h2o", "snapkv(x=1)"):
        with pytest.raises(PolicyError) as error:
            parse_method(text)
        allowed = str(error.value).partition("allowed:")[2]
        assert "kivi-2bit" not in str(error.value)
        assert "codec can" not in str(error.value)
        assert not allowed or ("snapkv" in allowed and "layers" not in allowed)
    with pytest.raises(PolicyError, match="allowed: raw, fp16"):
        parse("foo")


def test_an_alias_may_not_have_the_name_of_an_adapter() -> None:
    argv = ["x", "--cache-policy", "fp16", "--policy-alias", "poet=h2o", "--lora-modules"]
    args = make_parser().parse_args([*argv, "poet=/nowhere"])
    with pytest.raises(PolicyError, match="is a model name already"):
        configure(args)
