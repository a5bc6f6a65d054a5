"""Names that the packages take from vLLM are there, most of which are imported only when used."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("cache_policies", "linear_models", "server", "loadtest")
VERSIONS = "cache_policies/vllm_plugin/versions.py"  # has names of each release


def _taken(path: Path) -> list[tuple[str, str]]:
    return [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vllm"
        for alias in node.names
    ]


def test_what_is_imported_from_vllm_is_there() -> None:
    files = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    taken = {path: _taken(path) for path in files if path != ROOT / VERSIONS}
    assert sum(map(len, taken.values())) > 100
    missing = []
    for path, names in taken.items():
        for module, name in names:
            try:
                if not hasattr(importlib.import_module(module), name):
                    importlib.import_module(f"{module}.{name}")
            except ModuleNotFoundError:
                missing.append(f"{path.relative_to(ROOT)}: {name} of {module}")
    assert not missing
