"""What the GPU programs share: the GPU or a refusal in one line, timings, the table of results."""

from __future__ import annotations

import json
import math
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
FAILED, NO_GPU, INCOMPLETE = 1, 3, 4  # exit statuses
DEVICE = "cuda"
# Cycles that a GPU waits, some 20 ms, while the host queues what is timed.
HEAD_START = 40_000_000
FLUSHED = 1 << 28  # bytes, more than any GPU's cache holds


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
    """Median time of a call on the GPU, without what the host takes to launch it.

    The calls stand in a queue when the first begins, and none finds its data in the GPU's cache.
    """
    for _ in range(3):
        call()
    flushed = torch.empty(FLUSHED, dtype=torch.uint8, device=DEVICE)
    events = [
        [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        for _ in range(repeats)
    ]
    torch.cuda.synchronize()
    torch.cuda._sleep(HEAD_START)
    for start, end in events:
        flushed.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) / 1e3 for start, end in events)
    return float(times[len(times) // 2])


@dataclass
class Row:
    """One line of the table.

    Attributes:
        check: what was done.
        passed: None where it was only measured, or could not be run.
        note: the numbers, or why it could not be run.
        values: the numbers, for the JSON.
        incomplete: there was no time for it, or not enough.

    """

    check: str
    passed: bool | None
    note: str
    values: dict[str, Any] = field(default_factory=dict)
    incomplete: bool = False


def save(rows: list[Row], path: Path, **facts: Any) -> int:
    """Write the JSON and print the table.

    Returns:
        0, ``FAILED``, or ``INCOMPLETE`` where nothing failed and something was not finished.

    """
    content = _spelled({**facts, "rows": [asdict(row) for row in rows]})
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    width = max(len(row.check) for row in rows)
    for row in rows:
        mark = {True: "ok", False: "FAILED", None: "--"}[row.passed]
        print(f"{row.check:{width}}  {mark:6}  {row.note}")
    print(f"written: {path}")
    if any(row.passed is False for row in rows):
        return FAILED
    return INCOMPLETE if any(row.incomplete for row in rows) else 0


def _spelled(value: Any) -> Any:
    """The same, with words for the numbers that JSON lacks."""
    if isinstance(value, dict):
        return {key: _spelled(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_spelled(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
