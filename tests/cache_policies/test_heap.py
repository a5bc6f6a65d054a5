from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from cache_policies.vllm_plugin.heap import HeapTrimmer

PROGRAM = """
import ctypes, sys
from cache_policies.vllm_plugin.heap import HeapTrimmer
import numpy as np

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4 // 1024

trim = HeapTrimmer()
# freed memory between what stays: pieces of 64 KB, every 64th kept
pieces = [np.ones(16_000, np.float32) for _ in range(2048)]
kept = pieces[::64]
del pieces
before = resident()
assert trim()
print(before - resident())
"""


def test_it_gives_memory_back_that_lies_between_what_is_kept() -> None:
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("needs glibc")
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 60  # MiB of about 120


def test_it_does_so_now_and_then_only() -> None:
    trim = HeapTrimmer(every=3600)
    first = trim()
    assert not trim()
    assert first == hasattr(ctypes.CDLL(None), "malloc_trim")
