"""`kvthrift compare` on the real engine, as `make demo` runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from loadtest.measuring.summary import Summary
from loadtest.sending.records import read_records

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine
LOAD = "closed_concurrency=4"


def compare(out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server", "compare", "smollm2-135m", "--out", str(out)]
    flags = ["--memory", "64M", "--max-model-len", "2048", "--enforce-eager"]
    work = ["--workload", "passkey(lengths=300,depths=0.5,digits=7)"]
    return subprocess.run(
        [*command, *flags, *work, *more], capture_output=True, text=True, timeout=500, check=False
    )


def test_two_methods_share_a_server_and_a_second_call_keeps_the_runs(
    smollm2: Path, tmp_path: Path
) -> None:
    assert smollm2.exists()
    policies = ("--policy", "kivi-4bit", "--policy", "streaming-llm(window=60)+kivi-4bit")
    done = compare(tmp_path, *policies)
    assert done.returncode == 0, done.stdout + done.stderr
    whole, windowed = (
        Summary.model_validate_json((tmp_path / name / "summary.json").read_text())
        for name in (f"kivi-4bit@{LOAD}", f"streaming-llm_window=60_+kivi-4bit@{LOAD}")
    )
    for found in (whole, windowed):
        assert found.requests.ok == 2
        assert [c.agree for c in found.checks] == [True, True, True], found.checks
        assert found.server is not None
        assert found.server.prefix_hit_share == 0  # the second run does not find the first's pages
        assert found.server.rss_peak
        assert found.latency.tokens_per_event == 1.0
    assert whole.server is not None
    assert whole.server.capacity_tokens
    assert 7000 < whole.server.capacity_tokens < 9320
    assert whole.quality is not None
    assert windowed.quality is not None
    assert whole.quality.overall == 1.0
    assert windowed.quality.overall == 0.0  # the key lies before the window
    for record in read_records(tmp_path / f"kivi-4bit@{LOAD}" / "requests.jsonl"):
        assert len(record.events) == record.output_tokens == 15
    assert len(list(tmp_path.glob("server-*.log"))) == 1
    again = compare(tmp_path, *policies)
    assert again.returncode == 0
    assert again.stdout.count("kept from before") == 2
    other = compare(tmp_path, *policies, "--seed", "1")
    assert other.returncode == 2
    assert "holds runs with another seed" in other.stderr
    assert json.loads((tmp_path / "comparison.json").read_text())["seed"] == 0


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ((), "nothing to compare"),
        (("--policy", "kivi-5bit"), "unknown cache policy 'kivi-5bit'"),
        (("--stock", "--memory", "lots"), "--memory 'lots'"),
        (("--stock", "--memory", "²G"), "--memory '²G'"),
    ],
)
def test_what_cannot_be_compared_is_said_before_a_server_starts(
    tmp_path: Path, more: tuple[str, ...], says: str
) -> None:
    done = compare(tmp_path, *more)
    assert done.returncode == 2
    assert says in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_server_that_does_not_start_leaves_its_log(tmp_path: Path) -> None:
    done = compare(tmp_path, "--policy", "kivi-4bit", "--max-model-len", "99999999")
    assert done.returncode == 1
    assert "no run was finished" in done.stderr
    assert "server-kivi-4bit.log" in done.stdout
