"""Why a server cannot start, in words that say what to do."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from cache_policies.errors import PolicyError
from cache_policies.spelling import near
from server.models import MODELS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
# What vLLM's queue between two processes asks for; containers have 64 MiB by default.
SHARED_BYTES = 160 << 20
USUAL_CACHE = 4 << 30  # bytes
# Up to so many cores, all compute: one that is left to vLLM's scheduler, as by its default, is a
# quarter of them or more (benchmarks/threads.py).
FEW_CORES = 4
BIND, RESERVED = "VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_NUM_OF_RESERVED_CPU"
OURS = "KVTHRIFT_CACHE"
CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def choose_threads(cores: int) -> str:
    """Set vLLM's variables for threads where nobody did.

    Args:
        cores: that this process may use.

    Returns:
        What holds, for the log.

    """
    given = [f"{k}={os.environ[k]}" for k in (BIND, RESERVED) if k in os.environ]
    if os.environ.get(BIND, "auto") != "auto" or RESERVED in os.environ:
        return f"threads: {', '.join(given)}"
    if cores > FEW_CORES:
        return f"threads: one of {cores} cores is left to vLLM's scheduler; {RESERVED}=0 uses it"
    os.environ[RESERVED] = "0"
    return f"threads: all cores compute ({cores}); {RESERVED}=1 leaves one to vLLM's scheduler"


def misspelt(environment: Iterable[str]) -> list[str]:
    """What to say of variables whose names are almost ours; vLLM says it of its own."""
    found = ((name, near(name.lower(), [OURS.lower()])) for name in environment)
    return [f"{name} is not used; did you mean {OURS}?" for name, meant in found if meant]


def memory_here() -> int:
    """Bytes of memory that are free, and that this container may use."""
    limits = [psutil.virtual_memory().available]
    for path in CGROUP_LIMITS:
        try:
            limits.append(int(path.read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return min(limits)


def size_cache(args: argparse.Namespace, utilization: float, *, on_cpu: bool) -> None:
    """Size the cache where nobody did.

    On a CPU vLLM would take 92% of the machine's memory, and not start where less is free.

    Args:
        args: ``gpu_memory_utilization`` is None where it was not given, and is set.
        utilization: vLLM's default of it.
        on_cpu: whether the server runs on a CPU.

    """
    asked = (args.kv_cache_memory_bytes, args.gpu_memory_utilization)
    if args.gpu_memory_utilization is None:
        args.gpu_memory_utilization = utilization
    if on_cpu and asked == (None, None) and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        args.kv_cache_memory_bytes = min(USUAL_CACHE, memory_here() // 2) // ranks_here(args)


def ranks_here(args: argparse.Namespace) -> int:
    """Ranks of this machine, one at least: its share of all, or those of its own engines."""
    engine = args.tensor_parallel_size * args.pipeline_parallel_size
    engines = args.data_parallel_size
    if args.nnodes > 1:
        return max(1, engine * engines // args.nnodes)
    local = args.data_parallel_size_local
    return engine * (engines if local is None else max(1, local))


def refuse_remote_engines(args: argparse.Namespace) -> None:
    """Refuse engines of other machines behind this address, and a port for each engine here.

    Metrics of the former would be missing, and vLLM keeps sending requests to one that is lost; the
    latter's ports would each show those of all.

    Raises:
        PolicyError: naming the way out.

    """
    own_address = (
        args.data_parallel_hybrid_lb
        or args.data_parallel_external_lb
        or args.data_parallel_rank is not None
        or (args.data_parallel_start_rank is not None and not args.headless)
    )
    engine = args.tensor_parallel_size * args.pipeline_parallel_size
    elsewhere = ranks_here(args) < engine * args.data_parallel_size
    several = args.data_parallel_size > 1 and not own_address
    ports = args.data_parallel_multi_port_external_lb
    if ports or (several and (elsewhere or args.data_parallel_backend == "ray")):
        raise PolicyError(
            "a cache policy cannot be combined with data parallelism over several machines behind "
            "one address, by Ray, or with a port for each engine; start servers, with a router "
            "before them, see docs/scaling.md"
        )


def refuse_machine(args: argparse.Namespace, *, on_cpu: bool) -> None:
    """Refuse what would end in a killed process and no message.

    Raises:
        PolicyError: too little memory for the cache, or too little shared memory.

    """
    wanted, there = args.kv_cache_memory_bytes, memory_here()
    if on_cpu and wanted is not None and wanted > there:
        raise PolicyError(
            f"--kv-cache-memory-bytes {wanted} is more than the {there} bytes of memory that are "
            "free here; ask for less, or raise the container's limit"
        )
    try:
        shared = os.statvfs(SHARED_MEMORY)
    except OSError:
        return
    size = shared.f_blocks * shared.f_frsize
    if size < SHARED_BYTES:
        raise PolicyError(
            f"{SHARED_MEMORY} has {size >> 10} KiB, server processes talk through it and need "
            f"{SHARED_BYTES >> 20} MiB (docker run --shm-size, compose: shm_size)"
        )


def explain(error: Exception, args: argparse.Namespace) -> str | None:
    """One line for what a user can mend; None: a traceback says more."""
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return f"port {args.port} is in use; choose another with --port"
    from_hub = type(error).__module__.startswith("huggingface_hub")
    if from_hub or (isinstance(error, OSError) and "huggingface.co" in str(error)):
        return (
            f"model {args.model!r} cannot be had: it is neither one of {', '.join(MODELS)} nor a "
            "folder here. A hub name needs the hub (HF_HUB_OFFLINE not set, HF_TOKEN for gated "
            f"models) or its files in HF_HOME. The hub says: {str(error).splitlines()[0]}"
        )
    return None
