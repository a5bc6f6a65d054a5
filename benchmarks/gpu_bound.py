"""Bytes and instructions of a token in decode, and the bound that follows: arithmetic only.

Instructions are counted in the machine code that Triton makes for a GPU that is not here.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.gpu_machine import SHEETS
from cache_policies.pages.codecs.base import HEAD_SIZES
from tests.kernels.triton.aot import compiled, launches
from tests.kernels.triton.setup import make

POLICIES = (
    "fp16", "int8", "flexgen-4bit", "kivi-4bit", "kivi-2bit", "rotated-4bit", "rotated-3bit",
)  # fmt: skip
TARGETS = {"A100 SXM 80 GB": "sm_80", "H100 SXM": "sm_90", "H200 SXM": "sm_90"}
LANES = 128  # instructions of a thread that a multiprocessor issues in a cycle


def main() -> None:
    """Print a table for ``docs/gpu.md``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head-size", type=int, default=128, choices=HEAD_SIZES)
    head_size = parser.parse_args().head_size
    gpus = " | ".join(SHEETS)
    print(f"| Codec | bytes a token and KV head | instructions a number, sm_80 / sm_90 | {gpus} |")
    print("|---|---|---|" + "---|" * len(SHEETS))
    for policy in POLICIES:
        if head_size % 32 and policy.startswith(("flexgen", "kivi")):
            policy += "(group=16)"  # noqa: PLW2901
        size = make(policy, head_size=head_size, dtype=torch.bfloat16).layout.bytes_per_token
        decode = launches(policy, head_size=head_size)["attend decode"]
        each = {
            target: compiled("attend decode", decode, target).lane_instructions_per_code
            for target in sorted(set(TARGETS.values()))
        }
        cells = []
        for gpu, (bandwidth, processors, clock) in SHEETS.items():
            memory = bandwidth / size
            issue = processors * LANES * clock / (each[TARGETS[gpu]] * 2 * head_size)
            bound = "memory" if memory <= issue else f"instructions ({issue / memory:.0%})"
            cells.append(f"{min(memory, issue) / 1e9:.1f} G tokens/s, {bound}")
        counts = " / ".join(f"{n:.2f}" for n in each.values())
        print(f"| {policy} | {size:.0f} | {counts} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
