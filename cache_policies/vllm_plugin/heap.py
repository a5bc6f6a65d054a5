"""Gives freed memory back to the system.

Every step of a server has another number of tokens, so the model's activations come in ever new
sizes, and glibc keeps what it has freed between them: a quarter of the worker's memory after eight
minutes of mixed requests. With another allocator preloaded this finds nothing to do.
"""

from __future__ import annotations

import ctypes
import time

EVERY_SECONDS = 30.0


class HeapTrimmer:
    """Calls glibc's ``malloc_trim`` now and then; elsewhere it does nothing."""

    def __init__(self, every: float = EVERY_SECONDS) -> None:
        self._every = every
        self._next = 0.0
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)

    def __call__(self) -> bool:
        """Trim if it is time; whether it was."""
        now = time.monotonic()
        if self._trim is None or now < self._next:
            return False
        self._next = now + self._every
        self._trim(0)
        return True
