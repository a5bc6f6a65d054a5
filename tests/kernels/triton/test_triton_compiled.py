"""Compile the Triton kernels for GPUs that are not here: no stack, no spills, matrix instructions.

The interpreter takes what the compiler refuses, so both are needed. The daily run compiles a few
kernels of each kind, ``TRITON_CHECKS=all`` (``make test-triton-all``) every kernel of every codec.
"""

from __future__ import annotations

import os

import pytest
import torch

from tests.kernels.triton.setup import ALL

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels that are interpreted are not compiled", allow_module_level=True)

from tests.kernels.triton.aot import SHARED, TARGETS, compiled, launches

NVIDIA = [name for name in TARGETS if name.startswith("sm")]
DAILY = [
    ("kivi-4bit", 128, "attend decode", "sm_80"), ("kivi-4bit", 128, "attend decode", "gfx942"),
    ("kivi-4bit", 128, "attend decode", "sm_90"), ("kivi-4bit", 128, "attend decode", "sm_100"),
    ("kivi-4bit", 128, "combine decode", "sm_100"), ("kivi-4bit", 128, "absorb", "sm_80"),
    ("kivi-4bit", 128, "read", "gfx942"), ("flexgen-4bit", 64, "attend prefill", "sm_80"),
    ("fp16", 128, "attend decode", "sm_90"), ("int8", 80, "write", "sm_80"),
    ("int8", 64, "mass reading chosen pages, counted", "sm_90"),
    ("kivi-2bit", 64, "keep_ring", "gfx942"),
]  # fmt: skip
NIGHTLY = [
    (policy, head_size, "", target)
    for policy in ("raw", "fp16", "bf16", "int8", "flexgen-4bit(group=16)", "kivi-4bit(group=16)",
                   "kivi-4bit(group=32)", "kivi-2bit(group=16)", "kivi(k_bits=2,v_bits=4,group=16)",
                   "kivi(k_bits=8,v_bits=8,group=16)")
    for head_size in (64, 80, 96, 128, 256)
    for target in TARGETS
    if head_size % 32 == 0 or "group=32" not in policy
]  # fmt: skip


@pytest.mark.parametrize(("policy", "head_size", "kernel", "target"), NIGHTLY if ALL else DAILY)
def test_triton_compiles_without_spills(
    policy: str, head_size: int, kernel: str, target: str
) -> None:
    found = launches(policy, head_size=head_size)
    names = [kernel] if kernel else list(found)
    faults = []
    for name in names:
        made = compiled(name, found[name], target)
        if made.stack or made.spills:
            faults.append(f"{name}: {made.stack} bytes of stack, {made.spills} spills")
        if made.shared > SHARED[target]:
            faults.append(f"{name}: {made.shared} bytes of shared memory")
        if name.startswith(("attend", "mass")) and not made.matrix_instructions:
            faults.append(f"{name}: no matrix instruction")
    assert not faults


@pytest.mark.parametrize("head_size", [64, 128] if ALL else [128])
@pytest.mark.parametrize("policy", ["kivi-4bit", "flexgen-4bit"] if ALL else ["kivi-4bit"])
@pytest.mark.parametrize("target", NVIDIA)
def test_triton_decode_has_few_instructions_for_a_code(
    policy: str, head_size: int, target: str
) -> None:
    """Above about 5.5 an H100 would decode 4-bit pages slower than its memory delivers them."""
    found = launches(policy, head_size=head_size)
    assert (
        compiled("attend decode", found["attend decode"], target).lane_instructions_per_code < 5.5
    )


def test_triton_programs_are_recorded_as_they_run() -> None:
    """What is compiled is what an engine launches: each kernel, with its arguments' types."""
    found = launches("kivi-4bit", dtype=torch.float16)
    kernels = {name.split()[0] for name in found}
    assert kernels == {"attend", "combine", "mass", "absorb", "keep_ring", "read", "write"}
    modes = {
        (c.constants["SPLIT"], c.constants["READS"]) for n, c in found.items() if "attend" in n
    }
    assert modes == {(True, False), (False, False), (True, True)}
