"""Tensor and pipeline parallel over two hosts; one is killed, the other must say so and end."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

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
    ip,
    kill,
    lose_the_second,
    needs_namespaces,
    start,
    wait_for,
)

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

pytestmark = needs_namespaces


def start_both(model: str, logs: Path, parallel: list[str]) -> list[subprocess.Popen[bytes]]:
    command = [installed("kvthrift"), "serve", model, *FLAGS, *parallel]
    command += ["--nnodes", "2", "--master-addr", HOSTS[FIRST], "--node-rank"]
    second = start(SECOND, logs / "second", *command, "1", "--headless")
    first = start(FIRST, logs / "first", *command, "0")
    wait_for(first, logs / "first")
    return [first, second]


@pytest.mark.usefixtures("hosts")
@pytest.mark.parametrize("parallel", [TENSOR, PIPELINE], ids=["tensor", "pipeline"])
def test_two_hosts_give_the_tokens_of_one_and_end_when_one_is_lost(
    tiny: str, expected: list[list[int]], tmp_path: Path, parallel: list[str]
) -> None:
    first, _ = start_both(tiny, tmp_path, parallel)
    assert answers(tiny) == expected
    answer, status, seconds = lose_the_second(tiny)
    print(f"{status} {answer} after {seconds:.1f} s")
    assert (status, json.loads(answer)["error"]["code"]) == (500, 500)
    assert seconds < END
    assert first.wait(END) > 0
    assert f"rank 1 at {HOSTS[SECOND]} is gone" in (tmp_path / "first").read_text()


@pytest.mark.usefixtures("hosts")
@pytest.mark.parametrize("cut", [False, True], ids=["killed", "cut off"])
def test_hosts_end_that_lost_each_other_without_a_request(
    tiny: str, tmp_path: Path, *, cut: bool
) -> None:
    first, second = start_both(tiny, tmp_path, TENSOR)
    begin = time.monotonic()
    if cut:
        ip("-n", FIRST, "link", "set", "kvt0", "down")
    else:
        kill(FIRST)
    assert second.wait(2 * END) > 0
    print(f"after {time.monotonic() - begin:.1f} s")
    assert f"rank 0 at {HOSTS[FIRST]} is gone" in (tmp_path / "second").read_text()
    assert first.wait(2 * END) != 0
