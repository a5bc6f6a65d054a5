"""What a server that cannot start says."""

from __future__ import annotations

import argparse
import errno
import os
from typing import TYPE_CHECKING

import pytest
from vllm.platforms import current_platform

from cache_policies.errors import PolicyError
from server import serve, startup

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.next


def arguments(**options: object) -> argparse.Namespace:
    return argparse.Namespace(**{"port": 8000, "model": "m", "kv_cache_memory_bytes": 1, **options})


def test_a_cache_above_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup, "SHARED_BYTES", 0)  # whatever the machine of the test has
    startup.refuse_machine(arguments(), on_cpu=True)
    with pytest.raises(PolicyError, match="is more than the"):
        startup.refuse_machine(arguments(kv_cache_memory_bytes=1 << 60), on_cpu=True)
    startup.refuse_machine(arguments(kv_cache_memory_bytes=1 << 60), on_cpu=False)
    startup.refuse_machine(arguments(kv_cache_memory_bytes=None), on_cpu=True)
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(startup, "CGROUP_LIMITS", (limit, tmp_path / "nowhere"))
    limit.write_text("1000\n")
    assert startup.memory_here() == 1000
    limit.write_text("max\n")
    assert startup.memory_here() > 1000


def sized(monkeypatch: pytest.MonkeyPatch, free: int, **options: object) -> tuple[object, object]:
    monkeypatch.setattr(startup, "memory_here", lambda: free)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    on_cpu = bool(options.pop("on_cpu", True))
    usual = {"kv_cache_memory_bytes": None, "gpu_memory_utilization": None}
    ranks = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1}
    hosts = {"nnodes": 1, "data_parallel_size_local": None}
    args = arguments(**{**usual, **ranks, **hosts, **options})
    startup.size_cache(args, 0.92, on_cpu=on_cpu)
    return args.kv_cache_memory_bytes, args.gpu_memory_utilization


def test_a_cache_that_nobody_sized_leaves_memory_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sized(monkeypatch, 64 << 30) == (4 << 30, 0.92)
    assert sized(monkeypatch, 6 << 30) == (3 << 30, 0.92)
    assert sized(monkeypatch, 64 << 30, tensor_parallel_size=2) == (2 << 30, 0.92)
    assert sized(monkeypatch, 64 << 30, on_cpu=False) == (None, 0.92)
    assert sized(monkeypatch, 64 << 30, gpu_memory_utilization=0.5) == (None, 0.5)
    assert sized(monkeypatch, 64 << 30, kv_cache_memory_bytes=7) == (7, 0.92)


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        ({"tensor_parallel_size": 2, "nnodes": 2}, 1),
        ({"tensor_parallel_size": 2, "data_parallel_size": 4, "nnodes": 4}, 2),
        ({"data_parallel_size": 4}, 4),
        ({"data_parallel_size": 4, "data_parallel_size_local": 3}, 3),
        ({"data_parallel_size": 4, "data_parallel_size_local": 0}, 1),  # it only answers
    ],
)
def test_a_cache_that_nobody_sized_is_for_the_ranks_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, int], ranks: int
) -> None:
    assert sized(monkeypatch, 64 << 30, **options) == ((4 << 30) // ranks, 0.92)


def test_little_shared_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small:
        f_blocks, f_frsize = 256, 4096

    with monkeypatch.context() as patched:
        patched.setattr(os, "statvfs", lambda _: Small)
        with pytest.raises(PolicyError, match=r"has 1024 KiB.*need 160 MiB"):
            startup.refuse_machine(arguments(), on_cpu=True)


def test_what_a_user_can_mend_is_explained_and_nothing_else() -> None:
    taken = OSError(errno.EADDRINUSE, "Address already in use")
    assert startup.explain(taken, arguments()) == "port 8000 is in use; choose another with --port"
    missing = OSError("We couldn't connect to 'https://huggingface.co' to load the files.\nCheck")
    says = startup.explain(missing, arguments(model="x"))
    assert says is not None
    assert "model 'x' cannot be had" in says
    assert "smollm2-135m" in says
    assert startup.explain(OSError(errno.ENOSPC, "full"), arguments()) is None
    assert startup.explain(ValueError("x"), arguments()) is None


def test_few_cores_all_compute_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def chosen(cores: int, **given: str) -> tuple[str, str | None]:
        for name in (startup.BIND, startup.RESERVED):
            monkeypatch.setenv(name, "")  # so that the change is undone
            monkeypatch.delenv(name)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        return startup.choose_threads(cores), os.environ.get(startup.RESERVED)

    says, reserved = chosen(2)
    assert ("all cores compute (2)" in says, reserved) == (True, "0")
    assert chosen(2, VLLM_CPU_OMP_THREADS_BIND="auto")[1] == "0"  # compose's default
    says, reserved = chosen(64)
    assert ("one of 64 cores is left" in says, reserved) == (True, None)
    says, reserved = chosen(2, VLLM_CPU_NUM_OF_RESERVED_CPU="1")
    assert (says, reserved) == ("threads: VLLM_CPU_NUM_OF_RESERVED_CPU=1", "1")
    says, reserved = chosen(2, VLLM_CPU_OMP_THREADS_BIND="0-1")
    assert (says, reserved) == ("threads: VLLM_CPU_OMP_THREADS_BIND=0-1", None)


def test_a_variable_that_is_almost_ours_is_named() -> None:
    assert startup.misspelt(["KVTHRIFT_CACHE", "PATH", "HF_HOME", "KVTHRIFT_TAG"]) == []
    (said,) = startup.misspelt(["KVTHRIFT_CACHE_DIR"])
    assert said == "KVTHRIFT_CACHE_DIR is not used; did you mean KVTHRIFT_CACHE?"


def test_vllm_takes_every_core_when_it_is_told_to_reserve_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.utils.ompmultiprocessing import OMPProcessManager

    parallel = argparse.Namespace(
        local_world_size=1, data_parallel_rank_local=None, _api_process_count=1,
        assigned_physical_gpu_ids=None,
    )  # fmt: skip
    config = argparse.Namespace(parallel_config=parallel, kv_transfer_config=None)
    monkeypatch.setenv(startup.BIND, "auto")
    used = {}
    for reserved in (0, 1):
        monkeypatch.setenv(startup.RESERVED, str(reserved))
        used[reserved] = OMPProcessManager(config).cpu_lists[0]
    assert len(used[0]) == len(used[1]) + 1 or len(used[0]) == 1


class Stop(Exception):  # noqa: N818  # not an error of its own
    """The server has come as far as the test wants it."""


@pytest.mark.parametrize(("on_cpu", "method"), [(False, "spawn"), (True, None)])
def test_workers_are_spawned_on_a_gpu_as_by_vllms_own_command(
    monkeypatch: pytest.MonkeyPatch, on_cpu: bool, method: str | None
) -> None:
    """On a CPU vLLM's platform says it, once it has the engine's configuration."""
    variable = "VLLM_WORKER_MULTIPROC_METHOD"
    environment = {k: v for k, v in os.environ.items() if k != variable}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda *_: on_cpu)

    def stop(*_: object, **__: object) -> None:
        raise Stop

    monkeypatch.setattr(serve, "size_cache", stop)
    with pytest.raises(Stop):
        serve.run(["m"])
    assert environment.get(variable) == method
    environment[variable] = "fork"
    with pytest.raises(Stop):
        serve.run(["m"])
    assert environment[variable] == "fork"  # whoever asks for it has it


TWO_HOSTS = "--nnodes 2 --node-rank 1 --headless"


@pytest.mark.parametrize(
    "engines",
    [
        f"--data-parallel-size 2 {TWO_HOSTS}",
        "--data-parallel-size 2 --data-parallel-size-local 1",
        "--data-parallel-size 2 --data-parallel-size-local 0",
        "--data-parallel-size 2 --data-parallel-size-local 1 --data-parallel-start-rank 1 "
        "--headless",
        "--data-parallel-size 2 --data-parallel-backend ray",
        "--data-parallel-size 2 --data-parallel-multi-port-external-lb",
    ],
)
def test_engines_of_other_machines_are_refused_under_a_policy(engines: str) -> None:
    argv = ["smollm2-135m", *engines.split()]
    with pytest.raises(PolicyError, match="start servers, with a router"):
        serve.configure(serve.make_parser().parse_args([*argv, "--cache-policy", "fp16"]))
    serve.configure(serve.make_parser().parse_args(argv))


@pytest.mark.parametrize(
    "engines",
    [
        f"--tensor-parallel-size 2 {TWO_HOSTS}",
        "--data-parallel-size 2",
        "--data-parallel-size 2 --data-parallel-size-local 2 --tensor-parallel-size 2",
        "--data-parallel-size 2 --data-parallel-rank 1",
        "--data-parallel-size 4 --data-parallel-size-local 2 --data-parallel-hybrid-lb",
        "--data-parallel-size 4 --data-parallel-size-local 2 --data-parallel-start-rank 2",
    ],
)
def test_engines_of_this_machine_are_not_refused(engines: str) -> None:
    argv = ["smollm2-135m", *engines.split(), "--cache-policy", "fp16"]
    serve.configure(serve.make_parser().parse_args(argv))
