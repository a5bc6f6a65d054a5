"""Checks that constraints.txt is all that kvthrift[cpu,dev] needs; ``--exact``: and nothing else.

``scripts/setup.sh`` installs from it without resolving. After a change of pyproject.toml, install
what is new with ``pip install -c constraints.txt -e .[cpu,dev]``, then ``scripts/lock.py --write``.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCK = Path(__file__).parents[1] / "constraints.txt"
ROOT = Requirement("kvthrift[cpu,dev]")
# torch has its own index; the others of vLLM's do not import beside its build for CPUs
ELSEWHERE = {"kvthrift", "torch", "torchaudio", "torchcodec", "torchvision"}
BUILD = ("nanobind==3.1.0", "scikit_build_core==1.1.2")  # pip builds with them, apart


def needed(root: Requirement) -> dict[str, list[Requirement]]:
    """Requirements by package name, of a package and all it needs here."""
    found: dict[str, list[Requirement]] = {}
    seen: dict[str, set[str]] = {}
    left = [root]
    while left:
        wanted = left.pop()
        name = canonicalize_name(wanted.name)
        found.setdefault(name, []).append(wanted)
        extras = {"", *wanted.extras}
        if extras <= seen.setdefault(name, set()):
            continue
        seen[name] |= extras
        left += [r for r in _requires(name) if _applies(r, seen[name])]
    return found


def _requires(name: str) -> list[Requirement]:
    try:
        return [Requirement(text) for text in distribution(name).requires or ()]
    except PackageNotFoundError:
        return []


def _applies(wanted: Requirement, extras: set[str]) -> bool:
    return not wanted.marker or any(wanted.marker.evaluate({"extra": e}) for e in extras)


def faults(lock: list[str], *, exact: bool) -> list[str]:
    """What is wrong with a lock's lines, or with what is installed from it.

    Args:
        lock: ``name==version`` each, made for Python 3.11; another needs less.
        exact: whether a pin that is not needed here is a fault.

    """
    pins = {canonicalize_name(Requirement(x).name): Requirement(x) for x in lock}
    build = {canonicalize_name(Requirement(x).name) for x in BUILD}
    wanted = needed(ROOT)
    more = sorted({*pins} - {*wanted} - build) if exact else []
    found = [f"{name} is pinned and not needed" for name in more]
    for name, requirements in sorted(wanted.items()):
        if name in ELSEWHERE:
            continue
        try:
            here = distribution(name).version
        except PackageNotFoundError:
            here = ""
        if name not in pins:
            found.append(f"{name} is needed and not pinned (here: {here or 'missing'})")
        elif not here or not pins[name].specifier.contains(here, prereleases=True):
            found.append(f"{pins[name]} is pinned, {here or 'nothing'} is installed")
        found += [
            f"{name} {here} is not {r.specifier}, which another package needs"
            for r in requirements
            if here and not r.specifier.contains(here, prereleases=True)
        ]
    return found


def written() -> str:
    """The lock of what is installed."""
    names = sorted({*needed(ROOT)} - ELSEWHERE)
    pins = [f"{d.name}=={d.version}" for d in map(distribution, names)]
    return "".join(f"{line}\n" for line in sorted([*pins, *BUILD], key=str.lower))


def main() -> None:
    """Check, or with ``--write`` write."""
    if "--write" in sys.argv:
        LOCK.write_text(written(), encoding="utf-8")
    found = faults(LOCK.read_text(encoding="utf-8").split(), exact="--exact" in sys.argv)
    if found:
        raise SystemExit("constraints.txt: " + "\n                 ".join(found))


if __name__ == "__main__":
    main()
