"""All that is checked of the Triton kernels on a GPU, in at most eight minutes: ``make gpu-check``.

Needs torch for CUDA, Triton, pytest, hypothesis, numpy and transformers, and a C compiler, with
which Triton builds its launchers; no vLLM. compute-sanitizer is run where it is installed. Writes
one JSON, prints one table. Ends with 1 where something failed, and with 4 where nothing did but
the time was up first.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.gpu_machine import Row, require_gpu, save

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[1]
CHECKS = ROOT / "tests/kernels/triton"
LIMIT = 480  # seconds, for everything
TESTS, SANITIZER = 270, 60  # of it, at most
PROCESSES = 8  # that compile at a time
UNFINISHED = "not finished"
NO_TIME = "not run: no time left"
LINES = 2000  # of output that are kept


def kernel_tests(seconds: float) -> list[Row]:
    """The checks that the interpreter runs elsewhere, compiled.

    Compiling takes nearly all of the time, so they are dealt out to several processes.
    """
    until = time.monotonic() + seconds
    pytest = [sys.executable, "-m", "pytest"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    files = [str(path) for path in sorted(CHECKS.glob("check_*.py"))]
    found = finished("collecting the kernel tests", [*pytest, "--collect-only", "-q", *files],
                     environment, seconds)  # fmt: skip
    names = [
        line
        for line in found.values.get("output", ())
        if line.startswith("tests/") and "::" in line
    ]
    if not found.passed or not names:
        return [found]
    count = min(PROCESSES, os.cpu_count() or 1)

    def run(number: int) -> Row:
        command = [*pytest, "-v", "--tb=short", "--maxfail=3", *names[number::count]]
        name = f"kernel tests {number + 1}/{count}"
        return finished(name, command, environment, until - time.monotonic())

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def sanitizer(seconds: float) -> Row:
    """compute-sanitizer over one small step, where it is installed."""
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if tool is None:
        return Row("compute-sanitizer", None, "not run: not found on this machine")
    program = "from benchmarks.gpu_timing import reference_row as r; assert r('cuda').passed"
    command = [tool, "--error-exitcode", "9", sys.executable, "-c", program]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # It slows a program down many times: that it takes longer says nothing of the kernels.
    return replace(finished("compute-sanitizer", command, environment, seconds), incomplete=False)


def finished(name: str, command: list[str], environment: dict[str, str], seconds: float) -> Row:
    """Run a command; one that is not done in time has failed if its output says so."""
    if seconds < 5:
        return Row(name, None, NO_TIME, incomplete=True)
    process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True)  # fmt: skip
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # and what it started
        output, _ = process.communicate()
        failed = False if " FAILED " in output else None
        note = f"{UNFINISHED} after {seconds:.0f} s; {output.count(' PASSED ')} tests passed"
        return Row(name, failed, note, {"output": output.splitlines()[-LINES:]}, incomplete=True)
    lines = output.strip().splitlines() or [""]
    return Row(name, process.returncode == 0, lines[-1], {"output": lines[-LINES:]})


def attempt(name: str, call: Callable[[], Row | list[Row]], left: float) -> list[Row]:
    """The rows of a check; one that breaks must not hide the others' results."""
    if left <= 0:
        return [Row(name, None, NO_TIME, incomplete=True)]
    try:
        rows = call()
    except Exception as error:
        note = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1][:300]}"
        rows = Row(name, False, note, {"traceback": traceback.format_exc()})
    with suppress(RuntimeError):  # of a kernel that went wrong before
        torch.cuda.empty_cache()
    return rows if isinstance(rows, list) else [rows]


def checks(left: Callable[[], float]) -> Iterator[tuple[str, Callable[[], Row | list[Row]]]]:
    """All of them with their names, the most telling first."""
    from benchmarks import gpu_start, gpu_timing
    from benchmarks.gpu_model import model_row
    from cache_policies.kernels.reference import ReferenceKernel
    from cache_policies.kernels.triton.kernel import TritonKernel

    yield "kernels compiled at start", lambda: gpu_start.start_row("cuda")
    yield "kivi-4bit against the reference", lambda: gpu_timing.reference_row("cuda")
    yield "raw pages against torch's attention", lambda: gpu_timing.sdpa_row("cuda")
    yield "kernel tests", lambda: kernel_tests(min(TESTS, left()))
    yield "CUDA graph of a decode step", gpu_timing.graph_row
    for name, row, sizes in (
        ("decode", gpu_timing.decode_row, gpu_timing.DECODE),
        ("prefill", gpu_timing.prefill_row, gpu_timing.PREFILL),
    ):
        yield f"{name} torch", lambda n=name, s=sizes: gpu_timing.torch_row(n, *s)  # type: ignore[misc]
        for policy in gpu_timing.POLICIES:
            yield f"{name} {policy}", lambda r=row, p=policy: r(p)  # type: ignore[misc]
    for policy in ("raw", "kivi-4bit"):
        yield (
            f"transformers model over {policy} pages",
            lambda p=policy: model_row(p, "cuda", TritonKernel, ReferenceKernel, [300, 1, 1]),  # type: ignore[misc]
        )
    yield "compute-sanitizer", lambda: sanitizer(min(SANITIZER, left()))


def main() -> None:
    """Run the checks that fit into the time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"))
    options = parser.parse_args()
    require_gpu("gpu-check")
    start, gpu = time.monotonic(), torch.cuda.get_device_name()

    def left() -> float:
        return LIMIT - (time.monotonic() - start)

    rows = [row for name, call in checks(left) for row in attempt(name, call, left())]
    facts = {"gpu": gpu, "torch": torch.__version__, "seconds": time.monotonic() - start}
    sys.exit(save(rows, options.out, **facts))


if __name__ == "__main__":
    main()
