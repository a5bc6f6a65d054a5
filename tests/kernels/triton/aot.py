"""Compile the Triton kernels for GPUs that are not here, and read what the compiler made of them.

Run as a program it prints one line for each kernel and target; see also ``benchmarks.gpu_bound``.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from cache_policies.kernels.contract import Mass, Reads
from cache_policies.kernels.triton.kernel import TritonKernel
from cache_policies.kernels.triton.launch import Launch, recorded
from tests.kernels.triton.setup import make

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32), "gfx942": GPUTarget("hip", "gfx942", 64),
}  # fmt: skip
# Bytes of shared memory that a program may have on the smallest GPU of each kind: sm_86 and sm_89
# run what is built for sm_80.
SHARED = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Compiled:
    """A kernel for one target.

    Attributes:
        name: of the function, and what it was called for.
        target: a name of ``TARGETS``.
        binary: what Triton returns.
        warps: of a program.
        constants: compile-time arguments.

    """

    name: str
    target: str
    binary: Any
    warps: int
    constants: dict[str, Any]

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return int(self.binary.metadata.shared)

    @cached_property
    def _resources(self) -> dict[str, int]:
        if self.target == "gfx942":
            text = self.binary.asm["amdgcn"]
            found = [re.search(rf"\.{name}:\s+(\d+)", text)
                     for name in ("vgpr_count", "private_segment_fixed_size")]  # fmt: skip
            values = [int(match[1]) for match in found if match]
            assert len(values) == 2, "the assembly names its resources in another way"
            # Scalars in lanes of vectors and vectors in matrix units' registers stay on chip.
            local = len(re.findall(r"^\s+scratch_(?:load|store)", text, re.MULTILINE))
            return {"registers": values[0], "stack": values[1], "spills": local}
        used = re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", self._dump("-res-usage"))
        assert used, "cuobjdump names the resources in another way"
        local = _spills(op for op, _, _ in self.instructions)
        return {"registers": int(used[1]), "stack": int(used[2]) + int(used[3]), "spills": local}

    @property
    def registers(self) -> int:
        """Registers of a thread."""
        return self._resources["registers"]

    @property
    def stack(self) -> int:
        """Bytes of local memory of a thread."""
        return self._resources["stack"]

    @property
    def spills(self) -> int:
        """Instructions that load or store what was spilled to memory."""
        return self._resources["spills"]

    @property
    def looping_spills(self) -> int:
        """Those of them in the main loop."""
        return _spills(self.main_loop())

    @property
    def matrix_instructions(self) -> int:
        """Instructions of tensor cores or matrix cores."""
        if self.target == "gfx942":
            return self.binary.asm["amdgcn"].count("v_mfma")
        return sum("MMA" in op for op, _, _ in self.instructions)

    @cached_property
    def instructions(self) -> list[tuple[str, int, str]]:
        """SASS: operation, address, operands."""
        line = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*)")
        matches = (line.match(text) for text in self._dump("-sass").splitlines())
        return [(m[2], int(m[1], 16), m[3]) for m in matches if m]

    def main_loop(self) -> list[str]:
        """Operations of the loop over whole tiles: of the innermost loops with most products.

        The loop over tiles of which a part is held has as many, and more of the rest.
        """
        bodies = [
            [op for op, at, _ in self.instructions if low <= at <= high and op != "NOP"]
            for low, high in self._loops()
        ]
        most = max(sum("MMA" in op for op in body) for body in bodies)
        return min((b for b in bodies if sum("MMA" in op for op in b) == most), key=len)

    @property
    def lane_instructions_per_code(self) -> float:
        """Of the main loop; a tile has a code of a key and of a value for token and channel."""
        codes = self.constants["BLOCK"] * self.constants["PAGE"].head_size * 2
        return len(self.main_loop()) * self.warps * 32 / codes

    def _loops(self) -> list[tuple[int, int]]:
        found = []
        for op, at, rest in self.instructions:
            target = re.search(r"0x([0-9a-f]+)", rest) if op.startswith("BRA") else None
            if target and int(target[1], 16) < at:
                found.append((int(target[1], 16), at))
        inner = lambda a, b: a != b and a[0] >= b[0] and a[1] <= b[1]  # noqa: E731
        return [x for x in found if not any(inner(y, x) for y in found)]

    def _dump(self, what: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.binary.asm["cubin"])
            file.flush()
            command = [str(CUOBJDUMP), what, file.name]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _spills(operations: Iterable[str]) -> int:
    return sum(op.startswith(("LDL", "STL")) for op in operations)


def launches(policy: str, **options: Any) -> dict[str, Launch]:
    """What one layer launches, by name: every kernel, called as an engine calls it.

    Args:
        policy: a policy string.
        options: of ``Setup.make``; heads, head size, dtype.

    """
    options = {"heads": 32, "kv_heads": 8, "head_size": 128, "dtype": torch.bfloat16} | options
    setup = make(policy, **options)
    kernel = TritonKernel(setup.layout, setup.shape, splits=4)
    heads, row = setup.shape.num_kv_heads, setup.layout.ring_pages
    found: dict[str, Launch] = {}

    def note(name: str, *calls: Launch) -> None:
        for call in calls:
            back = " back" if call.constants.get("BACK") else ""
            found[f"{call.function.__name__}{back} {name}".strip()] = call

    for name, fresh in (("decode", [1, 1]), ("prefill", [96, 96])):
        batch, tokens = setup.batch([512, 512], fresh), setup.tokens(sum(fresh), 0)
        with recorded() as calls:
            kernel.attend(setup.pages, batch, *tokens, torch.empty_like(tokens[0]))
        note(name, *calls)
    first = torch.zeros(2, dtype=torch.int32)
    place = torch.tensor([0, -1], dtype=torch.int32)
    mass = Mass(first, first, place, torch.zeros(heads, 1024))
    lists = torch.zeros(2, heads, 4, dtype=torch.int32)
    reads = Reads(lists, first[:, None].expand(2, heads), torch.arange(2, dtype=torch.int32))
    batch, tokens = setup.batch([512, 512], [1, 1]), setup.tokens(2, 0)
    with recorded() as calls:
        kernel.attend(setup.pages, batch, *tokens, torch.empty_like(tokens[0]), mass, reads)
    note("reading chosen pages, counted", *calls)
    own = torch.arange(setup.block_table.shape[1])[:, None] * heads + torch.arange(heads)
    slots = own.T.int().repeat(2, 1, 1)
    with recorded() as calls:
        kernel.attend(setup.pages, replace(batch, slots=slots), *tokens,
                      torch.empty_like(tokens[0]), mass, reads)  # fmt: skip
    note("of uneven heads", *calls)
    batch, tokens = setup.batch([512, 512], [128, 128]), setup.tokens(256, 0)
    reads = Reads(lists, first[:, None].expand(2, heads), torch.arange(2, dtype=torch.int32), 128)
    blocks = torch.tensor([[0, 0, 128], [1, 0, 128]], dtype=torch.int32)
    with recorded() as calls:
        kernel.page_mass(setup.pages, batch, *tokens[:2], blocks, 8)
        kernel.attend(setup.pages, batch, *tokens, torch.empty_like(tokens[0]), mass, reads)
    note("of a sparse prefill", *calls)
    batch, tokens = setup.batch([500, 0], [96, 32]), setup.tokens(128, 0)
    one = batch.one(0, held=512, stored=512, store_row=row)
    index = torch.arange(512, dtype=torch.int32).expand(heads, -1).contiguous()
    x = torch.zeros(heads, 512, setup.layout.head_size)
    with recorded() as calls:
        kernel.append(setup.pages, batch, *tokens[1:])
        kernel.read(setup.pages, one, *tokens[1:], index)
        kernel.write(setup.pages, one, index, x, x)
    note("", *calls)
    with recorded() as calls:
        kernel.append(setup.pages, replace(batch, slots=slots), *tokens[1:])
        kernel.write(setup.pages, replace(one, slots=slots[:1]), index, x, x)
    note("of uneven heads", *calls)
    return found


def specialized(launch: Launch) -> tuple[Any, ...]:
    """What Triton compiles a launch for, as it decides at run time.

    Returns:
        of each argument its type and what is known of its value; types, compile-time arguments and
        known values as its compiler takes them.

    """
    function, keywords = launch.function, launch.constants | launch.options
    # NVIDIA's for all targets: AMD's also tells tensors of less than 2 GiB from others.
    backend = make_backend(TARGETS["sm_80"])
    binder = create_function_from_signature(function.signature, function.params, backend)
    bound, found, _ = binder(*launch.arguments, **keywords)
    _, *packed = function._pack_args(backend, keywords, bound, found, None)
    return tuple(found), *packed


def compiled(name: str, launch: Launch, target: str) -> Compiled:
    """Compile a recorded launch, as ``warm_up`` does on the smallest GPU of the target's kind."""
    launch = _there(launch, target)
    found = _compiled(name, launch, target)
    if found.shared > SHARED[target] and launch.options["num_stages"] > 1:
        launch = launch.with_one_stage()
        found = _compiled(name, launch, target)
    if found.spills and target != "gfx942":
        found = _compiled(name, launch.with_all_registers(), target)
    return found


def digest(launch: Launch, target: str) -> str:
    """Name what ``compiled`` makes: by code, types, what is known of values, Triton's version."""
    source, options = _source(_there(launch, target))
    told = f"{triton.__version__} {target} {source.hash()} {sorted(options.items())}"
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _there(launch: Launch, target: str) -> Launch:
    if target == "gfx942":
        return launch.on_amd()
    return launch.on_blackwell() if target == "sm_100" else launch


def _source(launch: Launch) -> tuple[ASTSource, dict[str, Any]]:
    _, *source = specialized(launch)
    return ASTSource(launch.function, *source), dict(launch.options)


def _compiled(name: str, launch: Launch, target: str) -> Compiled:
    source, options = _source(launch)
    binary = triton.compile(source, target=TARGETS[target], options=options)
    return Compiled(name, target, binary, options["num_warps"], launch.constants)


def report(
    policy: str, targets: list[str], kernels: str = "", **options: Any
) -> Iterator[Compiled]:
    """Compile the kernels whose name contains ``kernels``, and print a line for each."""
    for name, launch in launches(policy, **options).items():
        for target in targets if kernels in name else []:
            c = compiled(name, launch, target)
            loop = ""
            if name.startswith("attend") and target != "gfx942":
                loop = f"{c.lane_instructions_per_code:5.2f} instructions a code"
            print(
                f"{policy:12} {name:42} {target:7} registers {c.registers:3} stack {c.stack:4} "
                f"spills {c.spills:3} shared {c.shared:6} matrix {c.matrix_instructions:3} {loop}",
                flush=True,
            )  # fmt: skip
            yield c


if __name__ == "__main__":
    list(report(sys.argv[1], sys.argv[2].split(","), sys.argv[3] if len(sys.argv) > 3 else "",
                head_size=int(sys.argv[4]) if len(sys.argv) > 4 else 128))  # fmt: skip
