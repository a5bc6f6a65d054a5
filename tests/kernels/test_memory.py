"""Memory that runs out raises MemoryError; nothing is computed with what is not there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Allocations of megabytes find no free memory in the heap; above the threshold each is a mapping of
# its own, and the limit leaves no room for one.
PROGRAM = """
import resource, sys
import torch
from cache_policies.kernels.contract import Mass
from cache_policies.kernels.cpu import CpuKernel
from tests.kernels.harness import Setup

case, threads = sys.argv[1], {"partial": 4}.get(sys.argv[1], 1)
setup = Setup.make("fp16", seqs=1, heads=192, kv_heads=1, max_tokens=10000)
kernel = CpuKernel(setup.layout, setup.shape, num_threads=threads)
setup.fill([4000])

def attend(fresh, mass=None):
    query, key, value = setup.tokens(fresh, seed=0)
    batch, output = setup.batch([4000], [fresh]), torch.zeros_like(query)
    return lambda: kernel.attend(setup.pages, batch, query, key, value, output, mass)

def counting(fresh):
    zero = torch.zeros(1, dtype=torch.int32)
    return attend(fresh, Mass(zero, zero, zero, torch.zeros(1, 4000 + fresh)))

if case != "scratch":
    attend(1)()  # each thread has its scratch memory
sizes = {"scratch": 1, "partial": 2, "denominators": 4000, "enough": 8}
call = (attend if case in {"scratch", "partial"} else counting)(sizes[case])
if case != "enough":
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096, resource.RLIM_INFINITY))
try:
    call()
    print("done")
except MemoryError:
    print("MemoryError")
"""


@pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer needs its own mappings"
)
@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("scratch", "MemoryError"),
        ("partial", "MemoryError"),
        ("denominators", "MemoryError"),
        ("enough", "done"),
    ],
)
def test_a_failed_allocation_raises_memory_error(case: str, expected: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, case],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.strip() == expected, done.stderr
