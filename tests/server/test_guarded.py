"""With an API key: what wants it, and what stays open."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from server.serve import make_parser

KEY = "a key"
OPEN = {
    "/docs", "/docs/oauth2-redirect", "/health", "/is_scaling_elastic_ep", "/kv_event_sources",
    "/load", "/metrics", "/openapi.json", "/ping", "/policies", "/redoc", "/version",
}  # fmt: skip


@pytest.mark.next
def test_whatever_generates_reads_or_loads_wants_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A route of vLLM that is open and not in the list is new: look at what it does."""
    from vllm.entrypoints.launchers.app import build_app

    monkeypatch.setenv("VLLM_PLUGINS", "kvthrift")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    app = build_app(
        make_parser().parse_args(["x", "--api-key", KEY]), ("generate", "transcription")
    )
    client = TestClient(app, raise_server_exceptions=False)
    paths = {r.path: r for r in app.routes if r.path not in OPEN}
    assert {"/invocations", "/tokenize", "/adapters", "/v1/completions"} < {*paths}
    for path, route in paths.items():
        for method in getattr(route, "methods", None) or ("GET",):
            for headers in ({}, {"Authorization": "Bearer another"}):
                answer = client.request(method, path, headers=headers, json={})
                assert answer.status_code == 401, (method, path)
    known = client.post("/tokenize", headers={"Authorization": f"Bearer {KEY}"}, json=[])
    assert known.status_code != 401
