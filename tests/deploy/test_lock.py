"""constraints.txt, from which the set-up installs without resolving, is complete and no more."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def lock(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/lock.py", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "lock.py", tmp_path / "scripts")
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    return tmp_path


def test_it_is_what_is_needed_and_installed() -> None:
    done = lock(ROOT, "--exact")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("starlette==", "x==1\nstarlette==", "x is pinned and not needed"),
        ("starlette==", "starlette==9.", "is installed"),
        ("starlette==", "", "starlette is needed and not pinned"),
    ],
)
def test_a_wrong_one_is_noticed(copy: Path, old: str, new: str, says: str) -> None:
    file = copy / "constraints.txt"
    lines = file.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(old))
    lines[at] = lines[at].replace(old, new) if new else ""
    file.write_text("\n".join(lines) + "\n")
    done = lock(copy, "--exact")
    assert (done.returncode, says in done.stderr) == (1, True)


def test_it_can_be_written_anew(copy: Path) -> None:
    (copy / "constraints.txt").write_text("")
    assert lock(copy, "--write").returncode == 0
    written = (copy / "constraints.txt").read_text().split()
    assert sorted(written) == sorted((ROOT / "constraints.txt").read_text().split())


def test_the_set_up_resolves_nothing_and_asks_pytorchs_index_for_its_own_only() -> None:
    text = (ROOT / "scripts" / "setup.sh").read_text(encoding="utf-8")
    installs = [x.strip() for x in text.splitlines() if "pip install" in x]
    assert installs
    assert all("--no-deps" in x for x in installs)
    extra = [x for x in text.splitlines() if "--extra-index-url" in x]
    assert extra
    assert all(line.startswith(("torch() {", "vision() {")) for line in extra)
