"""The example of docs/extending.md, installed as a package of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "extending.md"
USE = """
import torch
from cache_policies.policy import parse
from tests.cache_policies.worker import Text, Worker
assert str(parse("value-norm(budget=100)+kivi-4bit")) == "value-norm(budget=100)+kivi-4bit"
text = Text(500)
worker = Worker("raw")
sequence = worker.start(text, "value-norm(budget=100,sinks=0,window=1)", 400)
worker.run(sequence, [150, 250])
for head, kept in enumerate(worker.positions(sequence)):
    norms = text.value[:399, head].norm(dim=-1)
    assert sorted(kept.tolist()) == sorted([*norms.topk(99).indices.tolist(), 399])
print("kept")
"""


def _install(folder: Path, entry: str) -> None:
    blocks = re.findall(r"```(\w+)\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    (folder / "my_methods.py").write_text(next(code for kind, code in blocks if kind == "python"))
    assert "my_methods:ValueNorm" in next(code for kind, code in blocks if kind == "toml")
    info = folder / "my_methods-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-methods\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[kvthrift.retention]\n{entry}\n")


def _run(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    path = f"import sys; sys.path[:0] = [{str(folder)!r}, {str(DOCUMENT.parents[1])!r}]\n"
    return subprocess.run(
        [sys.executable, "-c", path + code], capture_output=True, text=True, check=False
    )


def test_the_documented_example_works_as_written(tmp_path: Path) -> None:
    _install(tmp_path, "value-norm=my_methods:ValueNorm")
    done = _run(tmp_path, USE)
    assert done.stdout.strip() == "kept", done.stderr


def test_an_entry_point_under_another_name_is_refused(tmp_path: Path) -> None:
    _install(tmp_path, "value-norms=my_methods:ValueNorm")
    done = _run(tmp_path, "from cache_policies.policy import parse; parse('snapkv')")
    assert "not its class's name" in done.stderr


def test_an_entry_point_that_is_no_method_is_refused(tmp_path: Path) -> None:
    _install(tmp_path, "value-norm=my_methods:torch")
    done = _run(tmp_path, "from cache_policies.policy import parse; parse('snapkv')")
    assert "is not a Retention class" in done.stderr
