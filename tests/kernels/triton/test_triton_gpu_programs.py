"""``make gpu-check`` and ``make gpu-engine``: as far as they run without a GPU."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import gpu_check, gpu_engine, gpu_machine, gpu_start
from benchmarks.gpu_engine import ENVIRONMENT, agreement, passkeys, rows_of
from benchmarks.gpu_machine import FAILED, INCOMPLETE, NO_GPU, Row, save
from benchmarks.gpu_model import model_row
from benchmarks.gpu_timing import ENDS_GROUP, torch_attention
from cache_policies.kernels.cpu import CpuKernel
from cache_policies.kernels.reference import ReferenceKernel
from cache_policies.kernels.triton.warm import warm_up
from cache_policies.pages.codecs.packing import PLANES
from tests.kernels.harness import Setup
from tests.kernels.triton.absent import absent_gpu
from tests.kernels.triton.aot import TARGETS

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("program", ["gpu_check", "gpu_engine"])
def test_triton_programs_end_with_one_line_where_there_is_no_gpu(
    program: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", f"benchmarks.{program}", "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == NO_GPU
    assert len(done.stderr.strip().splitlines()) == 1
    assert "no GPU here" in done.stderr
    assert "nothing was run" in done.stderr
    assert not done.stdout
    assert not (tmp_path / "out.json").exists()


def test_triton_model_check_on_the_cpu_kernels() -> None:
    """The program that a GPU runs with Triton's kernels: here with the C++ ones."""
    for policy in ("raw", "kivi-4bit"):
        row = model_row(policy, "cpu", CpuKernel, ReferenceKernel, [150, 1, 1])
        assert row.passed, row


def test_triton_checks_against_torch_run_in_the_interpreter() -> None:
    program = (
        "from benchmarks.gpu_timing import reference_row, sdpa_row\n"
        "rows = [reference_row('cpu'), "
        "sdpa_row('cpu', seqs=1, context=70, heads=4, kv_heads=2, head_size=64)]\n"
        "assert all(row.passed for row in rows), rows\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles nothing")
@pytest.mark.parametrize("policy", ["kivi-4bit", "rotated-3bit"])
def test_triton_start_check_finds_what_is_compiled_late(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program that a GPU runs: here with a stand-in for Triton's driver and compiler."""
    gpu = absent_gpu(monkeypatch, TARGETS["sm_90"])
    row = gpu_start.start_row("cpu", policy)
    assert row.passed, row.note
    assert row.values["kernels"] == len(gpu.compiled) == 33
    absent_gpu(monkeypatch, TARGETS["sm_90"])
    monkeypatch.setattr(gpu_start, "warm_up", lambda layers, _: warm_up(layers, None))
    late = gpu_start.start_row("cpu", policy)
    assert not late.passed
    assert late.values["kernels"] + late.values["added"] == 33


def test_triton_results_are_saved_and_the_worst_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        Row("one", True, "fine"), Row("two", None, "measured", {"worst": math.nan}),
        Row("three", None, "no time", incomplete=True), Row("four", False, "broken"),
    ]  # fmt: skip
    assert save(rows, tmp_path / "out.json", gpu="none") == FAILED
    assert save(rows[:3], tmp_path / "late.json") == INCOMPLETE
    assert save(rows[:2], tmp_path / "good.json") == 0
    assert "four   FAILED  broken" in capsys.readouterr().out
    written = json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)
    assert written["gpu"] == "none"
    assert [row["passed"] for row in written["rows"]] == [True, None, None, False]
    assert written["rows"][1]["values"] == {"worst": "nan"}


class Event:
    """Notes the order of what a GPU would be asked."""

    said: ClassVar[list[str]] = []

    def __init__(self, *, enable_timing: bool) -> None:
        self.place = 0

    def record(self) -> None:
        self.place = len(self.said)
        self.said.append("event")

    def elapsed_time(self, other: Event) -> float:
        return float(other.place - self.place)


def test_triton_timings_wait_for_no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """All is queued behind a sleep, and the host waits once, at the end."""
    said = Event.said = []
    monkeypatch.setattr(gpu_machine, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_machine, "FLUSHED", 8)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda _: said.append("sleep"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("wait"))
    assert gpu_machine.seconds(lambda: said.append("call"), repeats=2) == 2e-3
    timed = ["event", "call", "event"]
    assert said == ["call"] * 3 + ["wait", "sleep"] + timed * 2 + ["wait"]


@pytest.mark.parametrize("fresh", [1, 5])
def test_triton_is_compared_with_torchs_attention_over_all_that_is_before(fresh: int) -> None:
    shape = {"heads": 4, "kv_heads": 2, "head_size": 16}
    torch.manual_seed(0)
    got = torch_attention(2, fresh, 7, "cpu", **shape)()
    torch.manual_seed(0)
    query = torch.randn(2, 4, fresh, 16, dtype=torch.bfloat16)
    key, value = torch.randn(2, 2, 2, 7 + fresh, 16, dtype=torch.bfloat16)
    mask = torch.ones(fresh, 7 + fresh, dtype=torch.bool).tril(7)
    expected = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(got, expected, atol=2e-2, rtol=0)


def test_triton_graph_check_moves_tokens_to_the_store() -> None:
    setup = Setup.make("kivi-4bit", packing=PLANES, dtype=torch.bfloat16)
    before, after = (setup.batch([ENDS_GROUP], [n]).stored_after for n in (0, 1))
    assert after > before


def test_triton_engines_raw_pages_are_compared_with_stock_ones() -> None:
    """As far as two kernels can agree in bfloat16: to the token they cannot."""
    facts = {"passkeys": 8, "of": 8, "tokens_per_second": 10.0, "prompt_tokens_per_second": 9.0}
    stock = {"tokens": [[1, 2, 3, 4], [5, 6, 7, 8]], "first": [{"1": -0.5}, {"5": -2.0}], **facts}
    assert agreement(stock, stock) == (1.0, 0.0)

    def passed(**changed: Any) -> bool | None:
        row, *_ = rows_of({"stock": stock, "raw": stock | changed})
        return row.passed

    assert passed()
    assert passed(tokens=[[1, 2, 9, 9], [5, 6, 9, 9]])  # they part late
    assert not passed(tokens=[[1, 2, 9, 9], [5, 9, 9, 9]])  # early
    assert passed(first=[{"1": -0.6}, {"5": -1.8, "9": -3.0}])
    assert not passed(first=[{"1": -0.5}, {"5": -2.3}])
    assert not passed(first=[{"1": -0.5}, {"9": -2.0}])  # not even likely
    for prompt, key in passkeys(4, 20):
        assert prompt.count(key) == 2


def test_triton_engines_do_not_fork_after_the_look_for_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    seen: dict[str, str] = {}

    def look(_: str) -> None:
        seen.update(os.environ)
        raise SystemExit(NO_GPU)

    monkeypatch.setattr(gpu_engine, "require_gpu", look)
    monkeypatch.setattr(sys, "argv", ["gpu_engine", "--engine", "raw"])
    with pytest.raises(SystemExit):
        gpu_engine.main()
    assert seen["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert seen["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"


def test_triton_engines_must_find_what_stock_finds() -> None:
    def judged(name: str, found: int, stock: int = 8) -> bool | None:
        facts = {"of": 8, "tokens_per_second": 1.0, "prompt_tokens_per_second": 1.0}
        results = {"stock": {"passkeys": stock, **facts}, name: {"passkeys": found, **facts}}
        (row,) = (row for row in rows_of(results) if row.check == name)
        return row.passed

    assert judged("kivi-4bit", 6)
    assert judged("kivi-4bit", 5) is False
    assert judged("int8", 4, stock=6)
    assert judged("int8", 0, stock=5) is None  # the model cannot do it
    assert judged("kivi-2bit", 0) is None


def test_triton_engines_leave_a_log_and_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine = f"print('x', end=''); print('\\n{gpu_engine.MARK}' + '{{}}')"
    programs = {
        "ends": fine,
        "fails": "import sys; print('ValueError: no room'); print('bye'); sys.exit(1)",
        "hangs": "import time; print('begun', flush=True); time.sleep(600)",
    }
    start = subprocess.Popen

    def popen(command: list[str], **options: Any) -> Any:
        return start([sys.executable, "-c", programs[command[-1]]], **options)

    monkeypatch.setattr(gpu_engine.subprocess, "Popen", popen)
    monkeypatch.setattr(gpu_engine, "LIMIT", 3)
    found = {name: gpu_engine.run_alone(name, "m", tmp_path / name) for name in programs}
    assert found["ends"] == {}
    assert isinstance(found["fails"], Row)
    assert found["fails"].note == f"ValueError: no room; see {tmp_path / 'fails'}"
    assert isinstance(found["hangs"], Row)
    assert found["hangs"].note.startswith("not done after 3 s")
    assert (tmp_path / "hangs").read_text() == "begun\n"


@pytest.mark.parametrize(
    ("said", "passed"), [("a PASSED \n b PASSED ", None), ("a PASSED \n b FAILED ", False)]
)
def test_triton_checks_without_time_have_failed_only_if_they_say_so(
    said: str, passed: bool | None
) -> None:
    """And what they started ends with them."""
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        f"print(child.pid, {said!r}, flush=True)\n"
        "time.sleep(600)\n"
    )
    row = gpu_check.finished("x", [sys.executable, "-c", program], dict(os.environ), 5)
    assert (row.passed, row.incomplete) == (passed, True)
    assert row.note == f"not finished after 5 s; {said.count('PASSED')} tests passed"
    child = int(row.values["output"][0].split()[0])
    until = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.1)


def test_triton_checks_without_any_time_are_not_run() -> None:
    assert gpu_check.finished("x", ["/nowhere"], {}, 4).incomplete
    (row,) = gpu_check.attempt("x", lambda: pytest.fail("run"), 0)
    assert row.incomplete


def test_triton_kernel_tests_are_dealt_out_to_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    collected = ["tests/a.py::one", "tests/a.py::two", "tests/b.py::three", "", "3 tests::"]
    ran: list[list[str]] = []

    def finished(name: str, command: list[str], *_: Any) -> Row:
        if "--collect-only" in command:
            return Row(name, True, "", {"output": collected})
        ran.append([word for word in command if "::" in word])
        return Row(name, True, "")

    monkeypatch.setattr(gpu_check, "finished", finished)
    monkeypatch.setattr(gpu_check.os, "cpu_count", lambda: 2)
    rows = gpu_check.kernel_tests(60)
    assert [row.check for row in rows] == ["kernel tests 1/2", "kernel tests 2/2"]
    assert sorted(ran) == [["tests/a.py::one", "tests/b.py::three"], ["tests/a.py::two"]]


def test_triton_check_that_breaks_hides_no_other() -> None:
    def breaks() -> Row:
        raise RuntimeError("at 1:2\nPassManager failed")

    (row,) = gpu_check.attempt("decode int8", breaks, 60)
    assert (row.check, row.passed) == ("decode int8", False)
    assert row.note == "RuntimeError: PassManager failed"
    assert "in breaks" in row.values["traceback"]


def test_triton_sanitizer_that_is_slow_has_not_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check.shutil, "which", lambda *_, **__: "/bin/x")
    late = Row("compute-sanitizer", None, "not finished", incomplete=True)
    monkeypatch.setattr(gpu_check, "finished", lambda *_: late)
    row = gpu_check.sanitizer(60)
    assert (row.passed, row.incomplete) == (None, False)


@pytest.mark.parametrize(("python", "offline"), [("python3", "0"), (".venv/bin/python", "1")])
def test_triton_programs_may_fetch_a_model_on_a_machine_of_their_own(
    python: str, offline: str
) -> None:
    command = ["make", "-npq", "-C", str(ROOT), "gpu-engine", f"GPU_PYTHON={python}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"HF_HUB_OFFLINE := {offline}" in done.stdout.splitlines()
