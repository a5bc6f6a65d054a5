"""What tests ask a server of the embedded model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from loadtest.commands.process import Server

MODEL = "smollm2-135m"
NOISE = "The grass is green. The sky is blue. "


def prompt(name: str, times: int = 40) -> str:
    """No prompt of another test begins so: nothing of it is in the prefix cache."""
    return f"{name}. " + NOISE * times


def held(answer: Any) -> dict[str, Any]:
    found: dict[str, Any] = answer.usage.kv_cache
    return found


def stats(server: Server, headers: dict[str, str] | None = None) -> dict[str, Any]:
    answer = httpx.get(f"{server.url}/v1/cache_policies/stats", headers=headers)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found
