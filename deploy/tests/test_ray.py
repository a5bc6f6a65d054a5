"""vLLM's Ray executor over two hosts; one is killed, the other must say so and end.

vLLM's CPU platform does not know Ray: ``ray_on_cpu`` stands in for it.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path

import pytest

from deploy.tests.hosts import (
    END,
    FIRST,
    FLAGS,
    HOSTS,
    PIPELINE,
    SECOND,
    TENSOR,
    answers,
    installed,
    lose_the_second,
    needs_namespaces,
    start,
    wait_for,
)

pytest.importorskip("ray", reason="Ray's executor needs ray")
pytestmark = needs_namespaces
ADDRESS = f"{HOSTS[FIRST]}:6379"
CLUSTER = {
    "PYTHONPATH": str(Path(__file__).with_name("ray_on_cpu")),
    "RAY_ADDRESS": ADDRESS, "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
}  # fmt: skip
NODE = ["--num-cpus", "1", "--num-gpus", "1", "--object-store-memory", "100000000"]
HEAD = ["--head", "--port", "6379", "--include-dashboard", "false"]


def node(host: str, *more: str) -> list[str]:
    return [installed("ray"), "start", "--node-ip-address", HOSTS[host], *NODE, *more]


@pytest.mark.usefixtures("hosts")
@pytest.mark.parametrize(
    ("parallel", "said"),
    [(TENSOR, f"[{HOSTS[SECOND]}]"), (PIPELINE, "RayWorkerProc rank=[1] died unexpectedly")],
    ids=["tensor", "pipeline"],
)
def test_two_nodes_give_the_tokens_of_one_and_end_when_one_is_lost(
    tiny: str, expected: list[list[int]], tmp_path: Path, parallel: list[str], said: str
) -> None:
    command = [installed("kvthrift"), "serve", tiny, *FLAGS, *parallel]
    first = start(
        FIRST, tmp_path / "first", *command, "--distributed-executor-backend", "ray",
        first=" ".join(node(FIRST, *HEAD)), **CLUSTER,
    )  # fmt: skip
    start(SECOND, tmp_path / "second", *node(SECOND, "--address", ADDRESS, "--block"), **CLUSTER)
    wait_for(first, tmp_path / "first")
    assert answers(tiny) == expected
    answer, status, seconds = lose_the_second(tiny)
    print(f"{status} {answer} after {seconds:.1f} s")
    assert seconds < END
    assert (status, json.loads(answer)["error"]["code"]) == (500, 500)
    assert first.wait(END) > 0
    assert said in (tmp_path / "first").read_text()
