"""All that is checked of the Triton kernels on a GPU, in at most eight minutes: ``make gpu-check``.

Needs torch for CUDA, Triton, pytest, hypothesis, numpy and transformers, and a C compiler, with
which Triton builds its launchers; no vLLM. compute-sanitizer is run where it is installed. Writes
one JSON, prints one table.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.gpu_machine import Row, require_gpu, save

ROOT = Path(__file__).parents[1]
CHECKS = ROOT / "tests/kernels/triton"
LIMIT = 480  # seconds, for everything
UNFINISHED = "not finished"


def kernel_tests(seconds: float) -> Row:
    """The checks that the interpreter runs elsewhere, compiled."""
    files = [str(path) for path in sorted(CHECKS.glob("check_*.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *files]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return _finished("kernel tests", command, environment, seconds)


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
    row = _finished("compute-sanitizer", command, environment, seconds)
    # It slows a program down many times: that it takes longer says nothing of the kernels.
    return replace(row, passed=None) if row.note.startswith(UNFINISHED) else row


def _finished(name: str, command: list[str], environment: dict[str, str], seconds: float) -> Row:
    if seconds < 5:
        return Row(name, None, "not run: no time left")
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True,
                              timeout=seconds, check=False)  # fmt: skip
    except subprocess.TimeoutExpired:
        return Row(name, False, f"{UNFINISHED} after {seconds:.0f} s")
    lines = (done.stdout + done.stderr).strip().splitlines() or [""]
    return Row(name, done.returncode == 0, lines[-1], {"output": lines[-40:]})


def main() -> None:
    """Run the checks that fit into the time, the most telling first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"))
    options = parser.parse_args()
    require_gpu("gpu-check")
    from benchmarks import gpu_model, gpu_start, gpu_timing
    from cache_policies.kernels.reference import ReferenceKernel
    from cache_policies.kernels.triton.kernel import TritonKernel

    start = time.monotonic()
    left = lambda: LIMIT - (time.monotonic() - start)  # noqa: E731
    rows = [gpu_timing.reference_row("cuda"), gpu_timing.sdpa_row("cuda")]
    for some in (
        lambda: [gpu_timing.graph_row()],
        lambda: [gpu_start.start_row("cuda")],
        gpu_timing.decode_rows,
        gpu_timing.prefill_rows,
        lambda: gpu_model.model_rows("cuda", TritonKernel, ReferenceKernel, [300, 1, 1]),
        lambda: [sanitizer(min(60, left()))],
        lambda: [kernel_tests(left())],
    ):
        try:
            rows += some() if left() > 0 else [Row("the rest", None, "not run: no time left")]
        except Exception as error:  # one failure must not hide the other results
            rows.append(Row("a check", False, f"{type(error).__name__}: {str(error)[:300]}"))
    facts = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    sys.exit(0 if save(rows, options.out, seconds=time.monotonic() - start, **facts) else 1)


if __name__ == "__main__":
    main()
