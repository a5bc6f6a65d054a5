"""``make gpu-check`` and ``make gpu-engine``: as far as they run without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check, gpu_engine, gpu_start
from benchmarks.gpu_engine import ENVIRONMENT, agreement, passkeys, rows_of
from benchmarks.gpu_machine import NO_GPU, Row, save
from benchmarks.gpu_model import model_rows
from cache_policies.kernels.cpu import CpuKernel
from cache_policies.kernels.reference import ReferenceKernel
from cache_policies.kernels.triton.warm import warm_up
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
    rows = model_rows("cpu", CpuKernel, ReferenceKernel, [150, 1, 1])
    assert [row.passed for row in rows] == [True, True], rows


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


def test_triton_results_are_saved_and_a_failure_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [Row("one", True, "fine"), Row("two", None, "not run"), Row("three", False, "broken")]
    assert not save(rows, tmp_path / "out.json", gpu="none")
    assert save(rows[:2], tmp_path / "good.json")
    assert "three  FAILED  broken" in capsys.readouterr().out
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["gpu"] == "none"
    assert [row["passed"] for row in written["rows"]] == [True, None, False]


def test_triton_engines_raw_pages_are_compared_with_stock_ones() -> None:
    """As far as two kernels can agree in bfloat16: to the token they cannot."""
    facts = {"passkeys": 8, "of": 8, "tokens_per_second": 10.0}
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


@pytest.mark.parametrize(("program", "passed"), [("sanitizer", None), ("kernel_tests", False)])
def test_triton_checks_that_a_sanitizer_slows_down_have_not_failed(
    monkeypatch: pytest.MonkeyPatch, program: str, passed: bool | None
) -> None:
    def slow(*_: Any, timeout: float, **__: Any) -> None:
        raise subprocess.TimeoutExpired("x", timeout)

    monkeypatch.setattr(gpu_check.shutil, "which", lambda *_, **__: "/bin/x")
    monkeypatch.setattr(gpu_check.subprocess, "run", slow)
    row = getattr(gpu_check, program)(60)
    assert (row.passed, row.note) == (passed, "not finished after 60 s")


@pytest.mark.parametrize(("python", "offline"), [("python3", "0"), (".venv/bin/python", "1")])
def test_triton_programs_may_fetch_a_model_on_a_machine_of_their_own(
    python: str, offline: str
) -> None:
    command = ["make", "-npq", "-C", str(ROOT), "gpu-engine", f"GPU_PYTHON={python}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"HF_HUB_OFFLINE := {offline}" in done.stdout.splitlines()
