"""Compile the Triton kernels for GPUs that are not here: no stack, no spills, matrix instructions.

The interpreter takes what the compiler refuses, so both are needed. The daily run compiles a few
kernels of each kind, ``make test-triton-all`` every kernel of every codec (``matrix.py``).
"""

from __future__ import annotations

import json
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch

from tests.kernels.triton.setup import ALL

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels that are interpreted are not compiled", allow_module_level=True)

from tests.kernels.triton.aot import SHARED, TARGETS, compiled, launches
from tests.kernels.triton.matrix import compile_layer, faults, read

if TYPE_CHECKING:
    from pathlib import Path

NVIDIA = [name for name in TARGETS if name.startswith("sm")]
DAILY = (
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


@pytest.mark.parametrize(("policy", "head_size", "kernel", "target"), DAILY)
def test_triton_compiles_without_spills(
    policy: str, head_size: int, kernel: str, target: str
) -> None:
    call = launches(policy, head_size=head_size)[kernel]
    assert not faults(compiled(kernel, call, target))


def test_triton_faults_are_told() -> None:
    """What is known of a kernel is what it may spill, before and after its main loop."""
    fine = SimpleNamespace(name="attend decode", target="sm_80", spills=0, stack=0, shared=0,
                           matrix_instructions=9, looping_spills=0)  # fmt: skip

    def told(known: int = 0, **changed: int) -> list[str]:
        return faults(SimpleNamespace(**{**vars(fine), **changed}), known)  # type: ignore[arg-type]

    assert told() == told(10, spills=10, stack=8) == []
    assert told(spills=1, stack=8) == ["8 bytes of stack, 1 spills"]
    assert told(10, spills=11) == ["0 bytes of stack, 11 spills"]
    assert told(10, stack=8) == ["8 bytes of stack, 0 spills"]
    assert told(10, spills=10, looping_spills=2) == ["2 spills in the main loop"]
    assert told(shared=SHARED["sm_80"] + 1) == [f"{SHARED['sm_80'] + 1} bytes of shared memory"]
    assert told(matrix_instructions=0) == ["no matrix instruction"]


def test_triton_matrix_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    file, made = tmp_path / "found.jsonl", tmp_path / "again.jsonl"
    layer = ("fp16", 64, "bfloat16", "no")
    keys = compile_layer((layer, ["sm_80"], "combine", file))
    lines = file.read_text().splitlines()
    assert len(lines) == len(keys) >= 1
    assert compile_layer((layer, ["sm_80"], "combine", file)) == keys
    assert file.read_text().splitlines() == lines, "nothing is compiled twice"
    made.write_text(lines[0].replace(json.loads(lines[0])["key"], "of another tree") + "\n")
    assert compile_layer((layer, ["sm_80"], "combine", made)) == keys
    assert len(read(made)) == len(keys) + 1


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
