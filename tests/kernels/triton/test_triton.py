"""The checks of the Triton kernels, run in Triton's interpreter: no GPU is needed.

The interpreter must be chosen before Triton is imported, so they run in a process of their own.
The daily run takes a few examples, ``TRITON_CHECKS=all`` (``make test-triton-all``) all of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cache_policies.errors import PolicyError
from cache_policies.kernels import kernel_class

HERE = Path(__file__).parent
SECONDS = 7200 if os.environ.get("TRITON_CHECKS") == "all" else 400


@pytest.mark.timeout(SECONDS + 20)
@pytest.mark.parametrize(
    "checks", ["check_numbers", "check_attend", "check_methods", "check_uneven"]
)
def test_triton_in_the_interpreter(checks: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider",
               "--timeout", str(SECONDS), str(HERE / f"{checks}.py")]  # fmt: skip
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout


def test_triton_checks_need_no_cpu_kernels() -> None:
    """On a GPU they run without a build, as the programs that time it."""
    names = [f"tests.kernels.triton.{path.stem}" for path in sorted(HERE.glob("check_*.py"))]
    names += [f"benchmarks.gpu_{name}" for name in ("check", "timing", "model", "start")]
    without = "import sys; sys.modules['cache_policies.kernels._cpu'] = None"
    program = f"{without}; import {', '.join(names)}"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], cwd=HERE.parents[2], env=environment,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_triton_kernel_is_refused_where_it_cannot_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel_class.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PolicyError, match="needs a GPU, and torch finds none; choose cache_kernel"):
        kernel_class("triton")
    monkeypatch.setitem(sys.modules, "cache_policies.kernels.triton.kernel", None)
    with pytest.raises(PolicyError, match=r"pip install '\.\[cuda\]' in a clone"):
        kernel_class("triton")
    kernel_class.cache_clear()


def test_a_gpu_takes_the_triton_kernel_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel_class.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert kernel_class("auto").name == "triton"
    assert kernel_class("cpu").name == "cpu"
    kernel_class.cache_clear()
