"""Two numbers a request, handed from a worker to the scheduler: pages read, of how many.

Which pages a sparse prefill reads is known in the workers only, and vLLM's outputs of a worker have
no place for it. Both processes map one small file. Can go when a worker may add to a request's
output.
"""

from __future__ import annotations

import os
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

SLOT_KEY = "kvthrift_mailbox_slot"
SLOTS = 4096  # requests under a sparse prefill at a time; those beyond report nothing


class Mailbox:
    """A file of ``[SLOTS, 2]`` float64, zero where nothing was written.

    Args:
        path: of the file; made where it is missing.

    """

    def __init__(self, path: Path) -> None:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+b") as file:
            file.truncate(SLOTS * 16)
            self._table: Any = np.memmap(file, np.float64, "r+", shape=(SLOTS, 2))
        self._free = list(range(SLOTS - 1, -1, -1))

    def take(self) -> int | None:
        """A slot for a new request; None where all are in use."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._table[slot] = 0
        return slot

    def give_back(self, slot: int) -> None:
        """The request has ended."""
        self._free.append(slot)

    def write(self, slot: int, read: float, possible: float) -> None:
        """Note what a request has read so far."""
        self._table[slot] = read, possible

    def share(self, slot: int) -> float | None:
        """Pages read over pages there were; None where nothing was written."""
        read, possible = self._table[slot]
        return float(read / possible) if possible else None


def _path(vllm_config: VllmConfig) -> Path:
    engine = f"{vllm_config.instance_id}-{vllm_config.parallel_config.data_parallel_index}"
    return Path(tempfile.gettempdir()) / f"kvthrift-{os.getuid()}-{engine}.mailbox"


_mailbox = lru_cache(maxsize=16)(Mailbox)


def mailbox_of(vllm_config: VllmConfig) -> Mailbox:
    """The mailbox of an engine: the same file in each of its processes on this machine."""
    return _mailbox(_path(vllm_config))


def remove_mailbox(vllm_config: VllmConfig) -> None:
    """Delete the file, if there is one; processes that have it mapped go on."""
    _path(vllm_config).unlink(missing_ok=True)


def slot_of(sampling_params: SamplingParams | None) -> int | None:
    """The slot that the scheduler gave the request."""
    extra = sampling_params.extra_args if sampling_params else None
    return (extra or {}).get(SLOT_KEY)
