"""``kvthrift loadtest`` against the mock server: results, failures, interruption."""

from __future__ import annotations

import csv
import json
import os
import resource
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from loadtest.measuring.summary import Summary
from loadtest.sending.records import read_records

if TYPE_CHECKING:
    from pathlib import Path

    from tests.loadtest.conftest import Command, MockServer

SMALL = ("-w", "passkey(lengths=250,depths=0.5,texts=noise)", "--warmup", "1")
QUICK = {"ttft": 0.02, "itl": 0.002}


def summary(folder: Path) -> Summary:
    return Summary.model_validate_json((folder / "summary.json").read_text())


def test_a_run_leaves_everything_a_report_needs(
    mock: MockServer, kvthrift: Command, tmp_path: Path
) -> None:
    url = mock(**QUICK)
    out = tmp_path / "out"
    goals = ("--goodput", "ttft:2s,tpot:500ms")
    done = kvthrift("loadtest", url, *SMALL, *goals, "-o", str(out), "--pid", str(os.getpid()))
    assert done.returncode == 0, done.stdout + done.stderr
    found = summary(out)
    assert (found.requests.planned, found.requests.ok, found.requests.errors) == (2, 2, 0)
    assert found.quality is not None
    assert found.quality.overall == 1.0
    assert [c.agree for c in found.checks] == [True, True, True]
    assert found.goodput is not None
    assert found.goodput.share == 1.0
    records = read_records(out / "requests.jsonl")
    assert sorted(r.output_tokens or 0 for r in records) == [15, 72]
    assert all(len(r.events) == r.output_tokens for r in records)
    assert all(
        0 <= r.scheduled <= r.sent < r.events[0] <= r.events[-1] <= r.finished for r in records
    )
    with (out / "metrics.csv").open() as file:
        names = {row["name"] for row in csv.DictReader(file)}
    assert {"vllm:kv_cache_usage_perc", "process_tree_resident_memory_bytes"} <= names
    assert (out / "report.html").stat().st_size > 10_000
    assert (out / "plots" / "timeline.png").stat().st_size > 1000
    assert str(out / "report.html") in done.stdout


def test_chat_and_completions_are_both_spoken(
    mock: MockServer, kvthrift: Command, tmp_path: Path
) -> None:
    url = mock(**QUICK)
    for endpoint in ("chat", "completions"):
        out = tmp_path / endpoint
        done = kvthrift("loadtest", url, *SMALL, "--endpoint", endpoint, "-o", str(out))
        assert done.returncode == 0, done.stdout + done.stderr
        assert summary(out).requests.ok == 2


@pytest.mark.parametrize(
    ("fault", "kind", "says"),
    [
        ("401", "http_401", "mock 401"),
        ("429", "http_429", "mock 429"),
        ("500", "http_500", "mock 500"),
        ("cut", "stream_cut", ""),
        ("no_done", "stream_cut", r"\[DONE\]"),
        ("invalid_sse", "invalid_sse", "not json"),
        ("no_usage", "no_usage", "usage"),
        ("error_event", "server_error", "engine died"),
    ],
)
def test_a_failure_is_counted_by_its_kind_and_kept_out_of_latencies(
    mock: MockServer, kvthrift: Command, tmp_path: Path, fault: str, kind: str, says: str
) -> None:
    # the warm-up is the mock's first request, so every second one that is measured fails
    url = mock(fault=fault, every=2, **QUICK)
    out = tmp_path / "out"
    workload = "synthetic(requests=6,input=fixed:30,output=fixed:6)"
    one = ("-a", "closed(concurrency=1)", "--warmup", "1")
    done = kvthrift("loadtest", url, "-w", workload, *one, "-o", str(out))
    assert done.returncode == 1, done.stdout + done.stderr
    found = summary(out)
    assert found.requests.by_error == {kind: 3}
    assert found.requests.ok == 3
    assert found.latency.ttft is not None
    assert found.latency.ttft.count == 3
    assert f"3 requests failed: 3 {kind}" in done.stdout
    failed = [r for r in read_records(out / "requests.jsonl") if r.status == "error"]
    assert len(failed) == 3
    for record in failed:
        assert record.error_kind == kind
        assert says.strip("\\[]") in str(record.error)
    assert all(check.agree is None for check in found.checks)


def test_a_timeout_is_a_failure(mock: MockServer, kvthrift: Command, tmp_path: Path) -> None:
    # of the whole request: no single token takes so long
    url = mock(ttft=0.05, itl=0.05)
    done = kvthrift("loadtest", url, *SMALL, "--timeout", "0.4", "-o", str(tmp_path / "out"))
    assert done.returncode == 1
    assert summary(tmp_path / "out").requests.by_error == {"timeout": 2}


def test_usage_beside_choices_is_not_a_token(
    mock: MockServer, kvthrift: Command, tmp_path: Path
) -> None:
    url = mock(fault="usage_with_choices", **QUICK)
    done = kvthrift("loadtest", url, *SMALL, "-o", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    for record in read_records(tmp_path / "requests.jsonl"):
        assert len(record.events) == record.output_tokens
        assert not record.event_tokens


def test_too_many_errors_stop_the_run(mock: MockServer, kvthrift: Command, tmp_path: Path) -> None:
    url = mock(fault="500", **QUICK)
    out = tmp_path / "out"
    done = kvthrift(
        "loadtest", url, "-w", "synthetic(requests=200,input=fixed:20)", "--warmup", "0",
        "--max-error-rate", "0.2", "-o", str(out),
    )  # fmt: skip
    assert done.returncode == 3
    assert "10 of 10 requests failed, the last: http_500" in summary(out).stopped
    assert "stopped early" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("http://127.0.0.1:9",), 4, "no server answers at http://127.0.0.1:9"),
        (("MOCK", "--model", "other"), 2, "does not serve 'other'; it serves: mock"),
        (("MOCK", "-w", "nothing"), 2, "unknown workload 'nothing'"),
        (("MOCK", "-a", "poisson(rate=-1)"), 2, "arrivals poisson: rate"),
        (("MOCK", "--goodput", "speed:2"), 2, "write ttft, tpot or e2e"),
        (("MOCK", "--search", "1-2"), 2, "--search needs --goodput"),
        (("MOCK", "--endpoint", "embeddings"), 2, "allowed: auto, completions, chat"),
        (("MOCK", "--extra-body", "{"), 2, "--extra-body is not JSON"),
        (("MOCK", "--extra-body", "null"), 2, "--extra-body is not a JSON object"),
        (("MOCK", "--extra-body", '{"x": NaN}'), 2, "--extra-body is not JSON (NaN"),
        (("MOCK", "--extra-body", '{"x": 1e999}'), 2, "1e999 is too large"),
        (("MOCK", "--extra-body", '{"stream": false}'), 2, "--extra-body: stream: the load test"),
        (("MOCK", "--api-key-file", "/nowhere"), 2, "--api-key-file /nowhere: No such file"),
        (("MOCK", "--tokenizer", "/nowhere"), 2, "--tokenizer /nowhere"),
        (("http://127.0.0.1:9", "--wait", "1"), 4, "no server at http://127.0.0.1:9 after 1 s"),
        (("nonsense", "--wait", "1"), 4, "no server at nonsense"),
        (("MOCK", "--serve-metrics", "9101"), 2, "'9101' is not HOST:PORT"),
        (("MOCK", "--serve-metrics", "1.2.3.4:9101"), 2, "1.2.3.4:9101: Cannot assign"),
        (("MOCK", "-o", "/proc/nowhere"), 5, "cannot write /proc/nowhere"),
    ],
)
def test_bad_input_is_one_clear_line(
    mock: MockServer, kvthrift: Command, arguments: tuple[str, ...], status: int, says: str
) -> None:
    url = mock() if "MOCK" in arguments else ""
    done = kvthrift("loadtest", *(url if a == "MOCK" else a for a in arguments))
    assert done.returncode == status, done.stdout + done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_key_is_sent_and_never_written_down(
    mock: MockServer, kvthrift: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = mock(api_key="sesame", **QUICK)
    out = tmp_path / "out"
    refused = kvthrift("loadtest", url, *SMALL, "-o", str(out))
    assert refused.returncode == 4
    assert "wants another API key" in refused.stderr
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    done = kvthrift("loadtest", url, *SMALL, "-o", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert not [p for p in out.rglob("*") if p.is_file() and b"sesame" in p.read_bytes()]


def test_a_full_disk_ends_the_run_with_a_message(mock: MockServer, tmp_path: Path) -> None:
    # a limit on the size of files stands for the full disk: the same OSError, another number
    process = start(mock(**QUICK), tmp_path, preexec_fn=limit_files)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 5, output
    assert f"cannot write {tmp_path}" in output
    kept = read_records(tmp_path / "requests.jsonl")  # the last line is cut short
    assert 0 < len(kept) < 12


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))


def start(url: str, out: Path, *more: str, **settings: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "server", "loadtest", url, "-o", str(out), "--warmup", "0"]
    work = ["-w", "synthetic(requests=12,input=fixed:30,output=fixed:20)"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    all_ = [*command, *work, "-a", "closed(concurrency=2)", *more]
    return subprocess.Popen(all_, **pipes, **settings)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []


def test_an_interrupted_run_keeps_what_it_has_and_goes_on_later(
    mock: MockServer, kvthrift: Command, tmp_path: Path
) -> None:
    url = mock(ttft=0.2, itl=0.02)
    process = start(url, tmp_path)
    while len(lines(tmp_path / "requests.jsonl")) < 4:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    first = summary(tmp_path)
    assert first.stopped == "SIGINT received"
    assert first.requests.ok >= 4
    assert first.requests.cancelled == 2
    assert 4 <= first.requests.ok < 12
    finished = {r["id"] for r in lines(tmp_path / "requests.jsonl") if r["status"] == "ok"}
    served = httpx.get(f"{url}/truth").json()
    served_before = {(k, tuple(v)) for k, v in served.items() if k in finished}
    resumed = start(url, tmp_path, "--resume")
    output, _ = resumed.communicate(timeout=60)
    assert resumed.returncode == 0, output
    whole = summary(tmp_path)
    assert (whole.requests.ok, whole.requests.cancelled, whole.stopped) == (12, 0, None)
    ids = [r["id"] for r in lines(tmp_path / "requests.jsonl")]
    assert len(ids) == len(set(ids)) == 12
    truth = {k: tuple(v) for k, v in httpx.get(f"{url}/truth").json().items()}
    assert len(truth) == 12
    assert served_before <= truth.items()  # nothing that was finished was sent again
    assert all(check.agree for check in whole.checks)
    other = kvthrift("loadtest", url, *SMALL, "-o", str(tmp_path), "--resume")
    assert other.returncode == 2
    assert "a run with another workload_hash, arrivals" in other.stderr
    policy = start(url, tmp_path, "--resume", "--cache-policy", "snapkv")
    output, _ = policy.communicate(timeout=60)
    assert policy.returncode == 2
    assert "a run with another policy, extra_hash" in output


def test_the_highest_rate_that_meets_the_goals_is_found(
    mock: MockServer, kvthrift: Command, tmp_path: Path
) -> None:
    # one slot of 0.1 s: 10 requests a second at most
    url = mock(ttft=0.1, itl=0.0, slots=1)
    done = kvthrift(
        "loadtest", url, "-w", "synthetic(requests=14,input=fixed:10,output=fixed:1)",
        "-a", "constant(rate=1)", "--goodput", "ttft:250ms", "--search", "5-40", "-o",
        str(tmp_path), "--warmup", "0",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "search.json").read_text())
    assert 8 < found["highest_rate"] < 13
    assert len(found["trials"]) == 7
