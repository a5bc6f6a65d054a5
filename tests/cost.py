"""What a call costs, whatever runs beside it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def cpu_seconds(call: Callable[[], object]) -> float:
    """Return the seconds of CPU of its cheapest of three calls, all threads together.

    A busy machine, and the collector in a process with much to look through, cost more once.
    """
    taken = []
    for _ in range(3):
        begin = time.process_time()
        call()
        taken.append(time.process_time() - begin)
    return min(taken)
