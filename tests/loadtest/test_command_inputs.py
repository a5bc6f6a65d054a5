"""What a user gives the command: bodies, loads, folders of earlier runs."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from loadtest.commands.given import read_extra
from loadtest.commands.run import safe_names
from loadtest.commands.session import _later
from loadtest.errors import LoadTestError
from loadtest.sending.arrivals import Schedule, parse_arrivals
from loadtest.sending.records import read_records
from loadtest.workloads import Item
from tests.loadtest.test_command import QUICK, SMALL, summary

if TYPE_CHECKING:
    from pathlib import Path

    from tests.loadtest.conftest import Command, MockServer


@pytest.mark.parametrize("xargs", ["[]", '"x"', "5", "true", '[["cache_policy", "x"]]'])
def test_vllm_xargs_that_are_no_object_are_refused(
    mock: MockServer, kvthrift: Command, xargs: str
) -> None:
    body = f'{{"vllm_xargs": {xargs}}}'
    done = kvthrift("loadtest", mock(), "--extra-body", body, "--cache-policy", "all")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "--extra-body: vllm_xargs is not a JSON object" in done.stderr


def test_a_policy_joins_other_arguments_of_the_body() -> None:
    joined = {"vllm_xargs": {"cache_policy": "tova"}}
    assert read_extra('{"vllm_xargs": null}', "tova") == joined
    assert read_extra('{"vllm_xargs": {}}', "tova") == joined
    assert read_extra('{"vllm_xargs": {"cache_policy": "tova"}}', "tova") == joined
    assert read_extra('{"vllm_xargs": {"k": 1}, "n": 1}', "tova") == {
        "vllm_xargs": {"k": 1, "cache_policy": "tova"}, "n": 1
    }  # fmt: skip
    assert read_extra('{"vllm_xargs": null}', None) == {"vllm_xargs": None}
    with pytest.raises(LoadTestError, match="cache_policy is 'h2o', --cache-policy 'tova'"):
        read_extra('{"vllm_xargs": {"cache_policy": "h2o"}}', "tova")


def test_the_same_load_twice_is_two_runs(
    mock: MockServer, kvthrift: Command, tmp_path: Path
) -> None:
    loads = ("closed(concurrency=1)", "closed", "closed(concurrency=1)", "closed( concurrency=4 )")
    flags = [x for load in loads for x in ("-a", load)]
    done = kvthrift("loadtest", mock(**QUICK), *SMALL, *flags, "-o", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    folders = sorted(p.parent.name for p in tmp_path.glob("*/summary.json"))
    one, four = "closed_concurrency=1", "closed_concurrency=4"
    assert folders == [one, f"{one}-2", four, f"{four}-2"]
    for name in folders:
        assert summary(tmp_path / name).requests.ok == 2
        assert len(read_records(tmp_path / name / "requests.jsonl")) == 2


def test_folder_names_are_never_the_same() -> None:
    texts = ["a(b=1)", "a_b=1", "A(b=1)", "a(b=1)-2", "a(b=1)", "x" * 300, "x" * 301]
    names = safe_names(texts)
    assert names[:5] == ["a_b=1", "a_b=1-2", "A_b=1-3", "a_b=1_-2", "a_b=1-4"]
    assert len({n.casefold() for n in names}) == len(texts)
    assert max(map(len, names)) < 128


def test_a_resumed_folder_of_other_requests_is_refused_and_doubles_count_once(
    mock: MockServer, kvthrift: Command, tmp_path: Path
) -> None:
    command = ("loadtest", mock(**QUICK), *SMALL, "-o", str(tmp_path), "--resume")
    assert kvthrift(*command).returncode == 0
    path = tmp_path / "requests.jsonl"
    text = path.read_text()
    seen, metrics = summary(tmp_path), (tmp_path / "metrics.csv").read_text()
    path.write_text(text + text)  # files that were put together
    assert kvthrift(*command, "--goodput", "ttft:9s").returncode == 0
    again = summary(tmp_path)
    assert again.requests.ok == 2
    # nothing was left to send: what was seen of the server is that of the run
    assert seen.checks[0].server
    assert (again.server, again.checks) == (seen.server, seen.checks)
    assert (tmp_path / "metrics.csv").read_text() == metrics
    assert again.quality == seen.quality
    assert again.goodput is not None
    assert again.goodput.share == 1.0
    assert path.read_text() == text
    for old, new in (('"passkey-0"', '"passkey-9"'), ('"prompt_hash": "', '"prompt_hash": "x')):
        path.write_text(text.replace(old, new))
        done = kvthrift(*command)
        assert done.returncode == 2
        assert "is not a request of this run" in done.stderr


@pytest.mark.parametrize("value", ["NaN", "1e999", '"soon"', "[1]", "null"])
def test_a_record_with_a_number_that_is_none_is_refused(
    mock: MockServer, kvthrift: Command, tmp_path: Path, value: str
) -> None:
    assert kvthrift("loadtest", mock(**QUICK), *SMALL, "-o", str(tmp_path)).returncode == 0
    path = tmp_path / "requests.jsonl"
    path.write_text(re.sub(r'"sent": [0-9.e-]+', f'"sent": {value}', path.read_text()))
    done = kvthrift("report", str(tmp_path), "-o", str(tmp_path))
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert f"{path}:1: " in done.stderr


def test_a_summary_with_a_number_that_is_none_is_refused(
    mock: MockServer, kvthrift: Command, tmp_path: Path
) -> None:
    assert kvthrift("loadtest", mock(**QUICK), *SMALL, "-o", str(tmp_path)).returncode == 0
    path = tmp_path / "summary.json"
    found = json.loads(path.read_text())
    for value in (float("nan"), float("inf"), -float("inf")):
        found["throughput"]["seconds"] = value
        path.write_text(json.dumps(found))
        done = kvthrift("report", str(tmp_path), "-o", str(tmp_path))
        assert done.returncode == 2
        assert f"{path}: not a summary of this version" in done.stderr


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--metric-names", "(?i)foo"), "--metric-names"),
        (("--metric-names", "("), "--metric-names"),
        (("--seed", "-1"), "--seed"),
        (("--pid", "-1"), "--pid"),
    ],
)
def test_bad_values_are_said_in_a_line(
    mock: MockServer, kvthrift: Command, flags: tuple[str, str], says: str, tmp_path: Path
) -> None:
    done = kvthrift("loadtest", mock(**QUICK), *SMALL, *flags, "-o", str(tmp_path))
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert says in done.stderr


def test_a_label_is_shown_as_it_is_written(
    mock: MockServer, kvthrift: Command, tmp_path: Path
) -> None:
    url = mock(**QUICK)
    for label in ("[/x]", "[red]x"):
        done = kvthrift("loadtest", url, *SMALL, "--label", label, "-o", str(tmp_path))
        assert (done.returncode, label in done.stdout) == (0, True), done.stdout + done.stderr


def test_a_run_is_reported_without_others_that_lie_beside_it(
    mock: MockServer, kvthrift: Command, tmp_path: Path
) -> None:
    url = mock(**QUICK)
    loads = ("-a", "closed(concurrency=1)", "-a", "closed(concurrency=2)")
    assert kvthrift("loadtest", url, *SMALL, *loads, "-o", str(tmp_path)).returncode == 0
    rows = (tmp_path / "results.csv").read_text().splitlines()
    assert len(rows) == 3
    assert kvthrift("loadtest", url, *SMALL, "-o", str(tmp_path)).returncode == 0
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 2
    # asked for the whole folder, the report has them all
    assert kvthrift("report", str(tmp_path), "-o", str(tmp_path)).returncode == 0
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 4


def test_what_is_left_of_an_open_loop_keeps_its_own_gaps() -> None:
    items = [Item(str(i), "t", "c", "x", max_tokens=1) for i in range(600)]
    left = [items[4], *items[300:]]
    schedule = Schedule(tuple(map(float, range(600))), None)
    later = _later(schedule, items, left, offset=302.0)
    assert later.due is not None
    assert later.due[:3] == (302.0, 303.0, 304.0)
    assert later.due[-1] == 602.0
    assert _later(schedule, items, items, offset=0.0) == schedule


def test_spellings_name_a_value_exactly() -> None:
    for text in ("1.0000001", "123456.7", "0.1", "3"):
        assert str(parse_arrivals(f"poisson(rate={text})")) == f"poisson(rate={text})"
