"""What is replayed. One workload, one file, one class."""

from __future__ import annotations

from loadtest.spec import parse_spec
from loadtest.workloads.base import Workload
from loadtest.workloads.code import Code
from loadtest.workloads.item import Item, hash_items
from loadtest.workloads.longbench import LongBench
from loadtest.workloads.passkey import Passkey
from loadtest.workloads.ruler import Ruler
from loadtest.workloads.synthetic import Synthetic
from loadtest.workloads.trace import Trace

__all__ = ["WORKLOADS", "Item", "Workload", "hash_items", "parse_workload"]

WORKLOADS: dict[str, type[Workload]] = {
    cls.kind: cls for cls in (Passkey, Ruler, LongBench, Code, Trace, Synthetic)
}


def parse_workload(text: str) -> Workload:
    """Read e.g. ``passkey(lengths=400|2800,digits=7)``.

    Raises:
        LoadTestError: says what is allowed.

    """
    return parse_spec(text, WORKLOADS, "workload")
