"""What bounds decode attention: instructions or memory, and how near the kernels come to it.

Usage: ``python -m benchmarks.decode_bound [--isa avx2] [--policy kivi-4bit] [--counts-only]``

Every instruction that a page of one KV head takes is counted by stepping through the kernel one by
one, over one page and over two, and taking the difference. The counts are exact and the same in
every run. ``objdump`` of GNU binutils says what the instructions are; ``Core`` says how many of a
kind a core begins in a cycle at most; the clock is measured between the rounds. Dependencies,
misses and branches are left out: the result is a lower bound of the time.

Prints, per shape, instruction set and policy: bytes, instructions and cycles of a token of one KV
head, what the cycles are bounded by, milliseconds of a layer that follow from it and from memory
(bytes of pages over the read bandwidth of the same run), those measured, and the greater bound's
share of them. Without ``--counts-only`` the machine must be idle.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import re
import signal
import statistics
import subprocess
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.attention import LAYERS, PAGE, SHAPES, bandwidth, ours
from cache_policies.kernels import _cpu  # type: ignore[attr-defined]  # built from src/
from cache_policies.kernels.cpu import supported_isas

if TYPE_CHECKING:
    from benchmarks.attention import Ours

POLICIES = ("fp16", "int8", "kivi-4bit", "kivi-2bit", "rotated-4bit")
ISAS = ("avx2", "avx512")
SEQS, TOKENS = 8, 8192
# vpaddd ymm_i, ymm_i, ymm7 for i = 0 .. 5, four times; dec rdi; jnz back; vzeroupper; ret
ADDITIONS = [bytes((0xC5, 0x85 | (~i & 15) << 3, 0xFE, 0xC7 | i << 3)) for i in range(6)] * 4
LOOP = b"".join(ADDITIONS) + bytes.fromhex("48ffcf 0f85")
LOOP += (-len(LOOP) - 4).to_bytes(4, "little", signed=True) + bytes.fromhex("c5f877 c3")
TRACE_ME, PEEK_USER, STEP = 0, 3, 9  # of ptrace
INSTRUCTION_POINTER = 16 * 8  # in struct user


@dataclass(frozen=True)
class Core:
    """What a core begins in a cycle at most; wide: where 512-bit instructions differ."""

    issue: float
    limits: dict[str, float]
    wide: dict[str, float]


# Golden Cove (Sapphire Rapids), by Intel's "64 and IA-32 Architectures Optimization Reference
# Manual": six micro-operations; vectors on ports 0, 1 and 5, of 512 bits on two of them; products,
# conversions and shifts on two; what crosses lanes on one; three loads, of 512 bits two; two
# stores. Loops of one instruction each showed the same rates on such a CPU.
CORE = Core(
    issue=6,
    limits={"vector": 3, "product": 2, "crossing": 1, "load": 3, "store": 2},
    wide={"vector": 2, "load": 2, "store": 1},
)
PRODUCT = re.compile(r"v(pmadd|pdp|dpbf|pmul|mul|fm|fnm|cvt|ps[rl]l|psra|max|min|p?rnd|round)")
CROSSING = re.compile(r"v(perm[dqp2w]|permt|p?ack|extract|shuf[fi]\d|pmov[suw])")
MOVE = re.compile(r"v?(p?broadcast|mov[aud]|movd|movq|movs[sd]|lddqu)")
NO_STORE = re.compile(r"(v?u?comis|cmp|test|push|call|jmp|prefetch|nop)")


def kinds(text: str) -> Counter[str]:
    """What an instruction occupies: ``issue``, and the kinds of ``Core.limits``.

    Args:
        text: the instruction as ``objdump -M intel`` writes it.

    """
    name, _, operands = re.sub(r"^(\{evex\}|cs|ds|notrack|bnd|data16)\s+", "", text).partition(" ")
    found = Counter({"issue": 1.0})
    memory = "[" in operands and name not in ("lea", "nop")
    stores = memory and "[" in operands.split(",")[0] and not NO_STORE.match(name)
    wide = "zmm" in operands

    def take(kind: str) -> None:
        found[kind] += CORE.limits[kind] / CORE.wide.get(kind, CORE.limits[kind]) if wide else 1

    if memory:
        take("store" if stores else "load")
    if name.startswith("v") and not MOVE.match(name) and name != "vzeroupper":
        take("vector")
        if CROSSING.match(name) and not stores:
            take("crossing")
        elif PRODUCT.match(name):
            take("product")
    return found


@cache
def listing() -> dict[int, str]:
    """Instructions of the extension module by their offset in it."""
    command = ["objdump", "-d", "--no-show-raw-insn", "-M", "intel", _cpu.__file__]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = (re.match(r"\s*([0-9a-f]+):\t(\S.*)", line) for line in text.splitlines())
    return {int(m[1], 16): re.sub(r"\s+", " ", m[2].split("#")[0]).strip() for m in lines if m}


def module_start() -> int:
    """The address at which the extension module is loaded."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return min(int(x.split("-")[0], 16) for x in maps if x.endswith(_cpu.__file__))


class Marked:
    """The kernel's layer; stops this process before and after ``attend``."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def attend(self, *arguments: int) -> None:
        signal.raise_signal(signal.SIGSTOP)
        self._layer.attend(*arguments)
        signal.raise_signal(signal.SIGSTOP)


def steps(layers: Ours) -> Counter[int]:
    """How often each instruction of the module runs in one ``attend``, by offset."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.restype = ctypes.c_long
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    child = os.fork()
    if not child:
        libc.ptrace(TRACE_ME, 0, None, None)
        layers.kernel._layer = Marked(layers.kernel._layer)
        layers.step()
        os._exit(0)
    start, found = module_start(), Counter[int]()
    os.waitpid(child, 0)
    try:
        while True:
            if libc.ptrace(STEP, child, None, None) < 0:
                raise OSError(ctypes.get_errno(), "this system lets no process be stepped through")
            _, status = os.waitpid(child, 0)
            if not os.WIFSTOPPED(status):
                raise RuntimeError("the kernel ended its process")
            if os.WSTOPSIG(status) != signal.SIGTRAP:
                return found
            found[libc.ptrace(PEEK_USER, child, INSTRUCTION_POINTER, None) - start] += 1
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@dataclass(frozen=True)
class Bound:
    """Of a token of one KV head; cycles by what they are bounded by."""

    instructions: float
    cycles: dict[str, float]

    @property
    def by(self) -> str:
        """What takes longest."""
        return max(self.cycles, key=lambda kind: self.cycles[kind])


def bound(policy: str, shape: tuple[int, int, int], isa: str) -> Bound:
    """Count a page that another one follows."""
    heads, kv_heads, head_size = shape
    of_head = (heads // kv_heads, 1, head_size)
    torch.manual_seed(0)
    few, more = (
        steps(ours(policy, 1, PAGE * n, 1, of_head, torch.float32, isa, layers=1, threads=1))
        for n in (1, 2)
    )
    taken: Counter[str] = Counter()
    instructions = 0
    for offset, count in more.items():
        if offset not in listing():  # of another library: memory, threads
            continue
        times = count - few[offset]
        instructions += times
        for kind, units in kinds(listing()[offset]).items():
            taken[kind] += units * times
    limits = {"issue": CORE.issue, **CORE.limits}
    return Bound(instructions / PAGE, {kind: taken[kind] / limits[kind] / PAGE for kind in limits})


class Clock:
    """Cycles a second that a core has for this process.

    From vector additions that do not wait for each other, of which a core begins three a cycle, on
    all cores at once: the clock changes with the load, and who shares a core takes a part of it.
    """

    def __init__(self) -> None:
        rights = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
        self._memory = mmap.mmap(-1, mmap.PAGESIZE, prot=rights)
        self._memory.write(LOOP)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._loop = ctypes.CFUNCTYPE(None, ctypes.c_long)(address)
        self._pool = ThreadPoolExecutor(torch.get_num_threads())

    def hertz(self, turns: int = 300_000) -> float:
        """The mean of the cores, now."""
        rates = self._pool.map(self._rate, [turns] * torch.get_num_threads())
        return statistics.mean(rates)

    def _rate(self, turns: int) -> float:
        begin = time.perf_counter()
        self._loop(turns)
        cycles = turns * len(ADDITIONS) / CORE.limits["vector"]
        return cycles / (time.perf_counter() - begin)


def measured(layers: Ours, rounds: int) -> tuple[float, float]:
    """Median seconds of a layer, and the clock between the rounds."""
    clock, times, clocks = Clock(), [], []
    layers.step()
    for _ in range(rounds):
        clocks.append(clock.hertz())
        begin = time.perf_counter()
        layers.step()
        times.append((time.perf_counter() - begin) / LAYERS)
    return statistics.median(times), statistics.median(clocks)


def main() -> None:
    """Run and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--isa", action="append", choices=supported_isas())
    parser.add_argument("--policy", action="append")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--counts-only", action="store_true", help="nothing is timed")
    options = parser.parse_args()
    isas = options.isa or [isa for isa in ISAS if isa in supported_isas()]
    speed = 1.0
    if not options.counts_only:
        speed = bandwidth()
        print(f"{torch.get_num_threads()} threads, read bandwidth {speed / 1e9:.1f} GB/s")
    for shape in SHAPES:
        print(f"\nshape (query heads, KV heads, head size) = {shape}; a token of one KV head:")
        print(f"{'':24}{'bytes':>7}{'instr.':>8}{'cycles':>8}  {'by':10}", end="")
        print("" if options.counts_only else "  GHz    ms by cycles, by memory, measured  share")
        for isa in isas:
            for policy in options.policy or POLICIES:
                show(policy, shape, isa, speed, 0 if options.counts_only else options.rounds)


def show(policy: str, shape: tuple[int, int, int], isa: str, speed: float, rounds: int) -> None:
    """Print a row; rounds 0: without times."""
    found = bound(policy, shape, isa)
    cycles, tokens = found.cycles[found.by], SEQS * TOKENS * shape[1]
    one = ours(policy, 1, PAGE, 1, shape, torch.float32, isa, layers=1)
    size = one.page_bytes / PAGE / shape[1]
    row = f"{isa:8}{policy:16}{size:7.1f}{found.instructions:8.1f}{cycles:8.2f}  {found.by:10}"
    if rounds:
        layers = ours(policy, SEQS, TOKENS, 1, shape, torch.float32, isa)
        took, hertz = measured(layers, rounds)
        computing = cycles * tokens / hertz / torch.get_num_threads()
        reading = layers.page_bytes / speed
        row += f"{hertz / 1e9:5.2f}{computing * 1e3:16.2f}{reading * 1e3:11.2f}{took * 1e3:10.2f}"
        row += f"{max(computing, reading) / took:7.0%}"
    print(row, flush=True)


if __name__ == "__main__":
    main()
