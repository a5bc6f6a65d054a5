"""Compile the Triton kernels for GPUs that are not here: no stack, no spills, matrix instructions.

The interpreter takes what the compiler refuses, so both are needed. The daily run compiles a few
kernels of each kind, ``TRITON_CHECKS=all`` (``make test-triton-all``) every kernel of every codec.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from tests.kernels.triton.setup import ALL

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels that are interpreted are not compiled", allow_module_level=True)

from tests.kernels.triton.aot import SHARED, TARGETS, compiled, launches

# Instructions that a kernel may spill by, nearly all outside its main loop; half the tokens in a
# tile would end it, with a quarter to a half more instructions.
WIDE, BLACKWELL = 140, 10  # of 256 channels; of 96 on sm_100
NVIDIA = [name for name in TARGETS if name.startswith("sm")]
DAILY = [
    (*case, torch.bfloat16)
    for case in (
        ("kivi-4bit", 128, "attend decode", "sm_80"),
        ("kivi-4bit", 128, "attend decode", "gfx942"),
        ("kivi-4bit", 128, "attend decode", "sm_90"),
        ("kivi-4bit", 128, "attend decode", "sm_100"),
        ("kivi-4bit", 128, "combine decode", "sm_100"),
        ("kivi-4bit", 128, "absorb", "sm_80"),
        ("kivi-4bit", 128, "read", "gfx942"),
        ("flexgen-4bit", 64, "attend prefill", "sm_80"),
        ("fp16", 128, "attend decode", "sm_90"),
        ("int8", 80, "write", "sm_80"),
        ("int8", 64, "mass reading chosen pages, counted", "sm_90"),
        ("kivi-2bit", 64, "keep_ring", "gfx942"),
        ("rotated-3bit", 80, "turn", "sm_80"),
        ("rotated-3bit", 80, "absorb", "sm_80"),
        ("kivi-4bit", 128, "sums of a sparse prefill", "sm_80"),
    )
]
CODECS = (
    "raw", "fp16", "bf16", "int8", "flexgen-4bit(group=16)", "kivi-4bit(group=16)",
    "kivi-4bit(group=32)", "kivi-2bit(group=16)", "kivi-2bit(group=32)",
    "kivi(k_bits=2,v_bits=4,group=16)", "kivi(k_bits=8,v_bits=8,group=16)", "rotated-4bit",
    "rotated-3bit", "rotated(k_bits=8,v_bits=4)",
)  # fmt: skip
PRODUCTS = ("attend", "mass", "sums", "shares")
# Kernels without products take a model's numbers only to convert them: one type is enough.
NIGHTLY = [
    (policy, head_size, kernel, target, dtype)
    for dtype, kernels in ((torch.bfloat16, ("",)), (torch.float16, PRODUCTS),
                           (torch.float32, PRODUCTS))
    for kernel in kernels
    for policy in CODECS
    for head_size in (64, 80, 96, 128, 256)
    for target in TARGETS
    if head_size % 32 == 0 or "group=32" not in policy
]  # fmt: skip
BENT = [  # under a soft cap, with learned sinks
    (policy, 128, kernel, target, torch.bfloat16)
    for policy in ("fp16", "kivi-4bit", "kivi-2bit")
    for kernel in ("attend", "mass")
    for target in TARGETS
]


def faults(
    policy: str, head_size: int, kernel: str, target: str, dtype: torch.dtype, **options: Any
) -> list[str]:
    """What a GPU would not take, or only slowly, of the kernel or of all whose names begin so."""
    calls, found = launches(policy, head_size=head_size, dtype=dtype, **options), []
    most = BLACKWELL if (head_size, target) == (96, "sm_100") else WIDE if head_size > 128 else 0
    for name in [kernel] if kernel in calls else [n for n in calls if n.startswith(kernel)]:
        made = compiled(name, calls[name], target)
        if made.spills > most or (made.stack and not most):
            found.append(f"{name}: {made.stack} bytes of stack, {made.spills} spills")
        if made.shared > SHARED[target]:
            found.append(f"{name}: {made.shared} bytes of shared memory")
        if name.startswith(PRODUCTS) and not made.matrix_instructions:
            found.append(f"{name}: no matrix instruction")
    return found


@pytest.mark.parametrize(
    ("policy", "head_size", "kernel", "target", "dtype"), NIGHTLY if ALL else DAILY
)
def test_triton_compiles_without_spills(
    policy: str, head_size: int, kernel: str, target: str, dtype: torch.dtype
) -> None:
    assert not faults(policy, head_size, kernel, target, dtype)


@pytest.mark.skipif(not ALL, reason="nightly")
@pytest.mark.parametrize(("policy", "head_size", "kernel", "target", "dtype"), BENT)
def test_triton_compiles_under_a_soft_cap_with_sinks(
    policy: str, head_size: int, kernel: str, target: str, dtype: torch.dtype
) -> None:
    assert not faults(policy, head_size, kernel, target, dtype, soft_cap=50.0, sinks=True)
    assert not faults(policy, head_size, kernel, target, dtype, soft_cap=50.0)


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
    assert kernels == {"attend", "combine", "mass", "sums", "shares", "absorb", "keep_ring",
                       "read", "write"}  # fmt: skip
    assert "turn back decode" in launches("rotated-3bit")
    modes = {
        (c.constants["SPLIT"], c.constants["READS"]) for n, c in found.items() if "attend" in n
    }
    assert modes == {(True, False), (False, False), (True, True), (False, True)}
