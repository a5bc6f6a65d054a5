"""Imports run downwards only: the order of the rooms, and no two modules that import each other."""

from __future__ import annotations

import ast
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("cache_policies", "linear_models", "loadtest", "server")
GROUND = "ground"  # modules in a package's root
# lowest first; a room may import those before it
ROOMS: dict[str, tuple[str, ...]] = {
    "cache_policies": (
        GROUND, "pages", "kernels", "retention", "retrieval", "policy", "step", "vllm_plugin",
    ),
    "linear_models": ("scans", GROUND),
    "loadtest": (
        GROUND, "quality", "workloads", "sending", "measuring", "report", "commands",
    ),
}  # fmt: skip
# what a package, or the one room named, may import of the others
ALLOWED = {
    "server": PACKAGES,
    "loadtest": ("cache_policies",),
    "linear_models": ("cache_policies",),  # its ground only
    "cache_policies.vllm_plugin": ("linear_models",),
}


def test_every_list_of_packages_has_them_all() -> None:
    """The wheel, the types that are checked, and what the image's build may see."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert set(project["scikit-build"]["wheel"]["packages"]) == set(PACKAGES)
    assert set(project["mypy"]["packages"]) == set(PACKAGES)
    seen = (ROOT / ".dockerignore").read_text().splitlines()
    assert {f"!{package}" for package in PACKAGES} <= set(seen)
    assert {p.parent.name for p in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"} == set(
        PACKAGES
    )


def modules() -> dict[str, Path]:
    """Our modules by dotted name."""
    found = {}
    for path in (p for package in PACKAGES for p in (ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """Our modules that a module names in an import, those for type checking included."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{name}: a relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {i if i in MODULES else node.module for i in inner}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {f for f in found if f in MODULES} - {name}


def room(name: str) -> str:
    parts = name.split(".")
    folder = (ROOT / parts[0] / parts[1]).is_dir() if len(parts) > 1 else False
    return parts[1] if folder else GROUND


@pytest.mark.parametrize("package", ROOMS)
def test_every_room_has_its_place(package: str) -> None:
    found = {room(name) for name in MODULES if name.split(".")[0] == package}
    assert found == set(ROOMS[package])


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_lower_rooms_only(name: str) -> None:
    package = name.split(".", maxsplit=1)[0]
    for other in imports(name):
        their_package = other.split(".")[0]
        if their_package != package:
            allowed = ALLOWED.get(".".join(name.split(".")[:2]), ALLOWED.get(package, ()))
            assert their_package in allowed, f"{name} imports {other}"
            if package == "linear_models":
                assert room(other) == GROUND, f"{name} imports {other}"
        elif package in ROOMS:
            order = ROOMS[package].index
            assert order(room(other)) <= order(room(name)), f"{name} imports {other}"


def test_no_two_modules_import_each_other() -> None:
    # A package's door imports its rooms, and a room may import the door's name: only leaves count.
    doors = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    graph = {name: imports(name) - doors for name in MODULES if name not in doors}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_vllm_is_imported_where_we_plug_into_it_only() -> None:
    for name, path in MODULES.items():
        in_room = room(name) == GROUND and name.startswith("linear_models")
        if not in_room and not name.startswith(("cache_policies.vllm_plugin", "server")):
            text = path.read_text(encoding="utf-8")
            roots = {
                (node.module or "").split(".")[0]
                for node in ast.walk(ast.parse(text))
                if isinstance(node, ast.ImportFrom)
            }
            assert "vllm" not in roots, name


def test_files_are_short() -> None:
    for folder in (*PACKAGES, "tests", "benchmarks", "deploy"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".cpp", ".h"} and "node_modules" not in path.parts:
                lines = len(path.read_text(encoding="utf-8").splitlines())
                assert lines <= 350, f"{path.relative_to(ROOT)}: {lines} lines"


MADE = {"empty", "eye", "linspace", "ones", "rand", "randn", "zeros"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_new_tensors_say_their_type(name: str) -> None:
    """Without one it is that of the model, while vLLM loads it."""
    calls = (x for x in ast.walk(ast.parse(MODULES[name].read_text())) if isinstance(x, ast.Call))
    for call in calls:
        if isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "torch":
            given = {keyword.arg for keyword in call.keywords}
            assert call.func.attr not in MADE or given & {"dtype", "out", None}, ast.unparse(call)
