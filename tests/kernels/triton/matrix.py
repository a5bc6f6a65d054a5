"""Compile every Triton kernel of every codec for every target; stopped, a run can be taken up.

``python -m tests.kernels.triton.matrix FILE`` adds a line of JSON to the file for each kernel that
it lacks as it is now, and says at the end what a GPU would not take, or only slowly.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from itertools import product
from operator import contains
from pathlib import Path
from typing import Any

import torch
import triton

from cache_policies.errors import PolicyError
from tests.kernels.triton.aot import SHARED, TARGETS, Compiled, compiled, digest, launches

CODECS = (
    "raw", "fp16", "bf16", "int8", "flexgen-4bit", "flexgen-4bit(group=16)", "kivi-4bit",
    "kivi-4bit(group=16)", "kivi-2bit", "kivi-2bit(group=16)", "kivi(k_bits=2,v_bits=4,group=16)",
    "kivi(k_bits=8,v_bits=8,group=16)", "rotated-4bit", "rotated-3bit",
    "rotated(k_bits=8,v_bits=4)",
)  # fmt: skip
HEAD_SIZES = (64, 80, 96, 128, 256)
DTYPES = ("bfloat16", "float16", "float32")
# Kernels without products take a model's numbers only to convert them: one type is enough.
PRODUCTS = ("attend", "mass", "sums", "shares")
BENDS: dict[str, dict[str, Any]] = {  # of scores
    "no": {}, "cap": {"soft_cap": 50.0}, "cap and sinks": {"soft_cap": 50.0, "sinks": True},
}  # fmt: skip
PARTS: dict[str, tuple[Any, ...]] = {
    "codec": CODECS,
    "head_size": HEAD_SIZES,
    "dtype": DTYPES,
    "bend": tuple(BENDS),
}
Layer = tuple[str, int, str, str]  # codec, head size, the model's type, bend
LAYERS: list[Layer] = [
    *((codec, size, dtype, "no") for dtype, size, codec in product(DTYPES, HEAD_SIZES, CODECS)),
    *product(("fp16", "kivi-4bit", "kivi-2bit"), (128,), ("bfloat16",), ("cap", "cap and sinks")),
]


# Instructions that spill, none in the main loop; of any other kernel one is a fault.
KNOWN = {
    ("int8", 256, "attend prefill", "sm_90"): 20,
    ("int8", 256, "attend of a sparse prefill", "sm_90"): 30,
    ("rotated-3bit", 256, "attend of uneven heads", "sm_100"): 2,  # with 3.8 alone
    ("kivi-4bit(group=16)", 96, "attend prefill", "sm_100"): 10,
    ("kivi-4bit(group=16)", 80, "attend of a sparse prefill", "sm_100"): 8,
}


def faults(made: Compiled, known: int = 0) -> list[str]:
    """What a GPU would not take, or only slowly; ``known``: spills outside the main loop."""
    found = []
    if made.spills > known or (made.stack and not made.spills):
        found.append(f"{made.stack} bytes of stack, {made.spills} spills")
    elif made.spills and made.looping_spills:
        found.append(f"{made.looping_spills} spills in the main loop")
    if made.shared > SHARED[made.target]:
        found.append(f"{made.shared} bytes of shared memory")
    if made.name.startswith(PRODUCTS) and not made.matrix_instructions:
        found.append("no matrix instruction")
    return found


def calls(layer: Layer) -> dict[str, Any]:
    """What a layer launches, by name."""
    policy, head_size, dtype, bend = layer
    options = BENDS[bend] | {"dtype": getattr(torch, dtype)}
    try:
        found = launches(policy, head_size=head_size, **options)
    except PolicyError as error:
        if "does not divide head size" in str(error):
            return {}
        raise
    plain = (dtype, bend) == ("bfloat16", "no")
    return {name: call for name, call in found.items() if plain or name.startswith(PRODUCTS)}


def row(layer: Layer, name: str, target: str, key: str, launch: Any) -> dict[str, Any]:
    """Compile one kernel."""
    made = compiled(name, launch, target)
    loop = name.startswith("attend") and target != "gfx942"
    return {
        "key": key, "triton": triton.__version__, **dict(zip(PARTS, layer, strict=True)),
        "kernel": name, "target": target,
        "registers": made.registers, "stack": made.stack, "spills": made.spills,
        "shared": made.shared, "matrix": made.matrix_instructions,
        "instructions": round(made.lane_instructions_per_code, 2) if loop else None,
        "faults": faults(made, KNOWN.get((*layer[:2], name, target), 0)),
    }  # fmt: skip


def compile_layer(task: tuple[Layer, list[str], str, Path]) -> set[str]:
    """Add what the file lacks of a layer's kernels, a line at a time; the keys of all of them."""
    layer, targets, wanted, file = task
    known, keys = read(file), set()
    for name, launch in calls(layer).items():
        for target in targets if wanted in name else ():
            key = digest(launch, target)
            keys.add(key)
            if key not in known:
                known[key] = row(layer, name, target, key, launch)
                with file.open("a") as out:
                    out.write(json.dumps(known[key]) + "\n")
    return keys


def read(file: Path) -> dict[str, dict[str, Any]]:
    """Lines of a file by their keys."""
    lines = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    return {line["key"]: line for line in lines}


def main(arguments: list[str]) -> int:
    """Run it; 1 where a kernel has a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    for name, known in PARTS.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", action="append", type=type(known[0]), choices=known
        )
    parser.add_argument("--target", action="append", choices=TARGETS)
    parser.add_argument("--kernels", default="", help="what their names contain; default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    given = parser.parse_args(arguments)
    parts = [getattr(given, name) or known for name, known in PARTS.items()]
    layers = [x for x in LAYERS if all(map(contains, parts, x))]
    tasks = [(x, given.target or list(TARGETS), given.kernels, given.file) for x in layers]
    with multiprocessing.get_context("spawn").Pool(given.jobs, maxtasksperchild=8) as pool:
        keys = set().union(*pool.imap_unordered(compile_layer, tasks))
    wrong = [x for key, x in read(given.file).items() if key in keys and x["faults"]]
    for x in wrong:
        print(*(x[part] for part in (*PARTS, "kernel", "target")), *x["faults"], sep=", ")
    print(f"Triton {triton.__version__}: {len(keys)} kernels, {len(wrong)} of them with a fault")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
