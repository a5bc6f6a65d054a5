"""What the GPU programs share: the GPU or a refusal in one line, timings, the table of results."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# Data sheets: bytes/s of memory, streaming multiprocessors, boost clock in Hz under load.
SHEETS = {
    "A100 SXM 80 GB": (2.039e12, 108, 1.41e9),
    "H100 SXM": (3.35e12, 132, 1.755e9),
    "H200 SXM": (4.8e12, 132, 1.755e9),
}
NO_GPU = 3  # exit status


def require_gpu(command: str) -> None:
    """End the program with one line where there is no GPU."""
    if not torch.cuda.is_available():
        print(f"{command}: no GPU here (torch {torch.__version__} finds none); nothing was run",
              file=sys.stderr)  # fmt: skip
        raise SystemExit(NO_GPU)


def memory_bandwidth() -> float:
    """Bytes a second of this GPU, measured: half a gigabyte copied, read and written."""
    x = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / seconds(lambda: y.copy_(x))


def seconds(call: Callable[[], Any], repeats: int = 20) -> float:
    """Median time of a call on the GPU."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


@dataclass
class Row:
    """One line of the table.

    Attributes:
        check: what was done.
        passed: None where it was only measured, or could not be run.
        note: the numbers, or why it could not be run.
        values: the numbers, for the JSON.

    """

    check: str
    passed: bool | None
    note: str
    values: dict[str, Any] = field(default_factory=dict)


def save(rows: list[Row], path: Path, **facts: Any) -> bool:
    """Write the JSON and print the table; whether nothing failed."""
    path.write_text(json.dumps({**facts, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")
    width = max(len(row.check) for row in rows)
    for row in rows:
        mark = {True: "ok", False: "FAILED", None: "--"}[row.passed]
        print(f"{row.check:{width}}  {mark:6}  {row.note}")
    print(f"written: {path}")
    return all(row.passed is not False for row in rows)
