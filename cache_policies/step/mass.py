"""Attention counted per held token: one buffer a layer, in which requests have rooms."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

STEP = 256  # places by which a room grows at least


@dataclass
class MassBuffer:
    """The mass of every request that counts attention in one layer.

    Rooms are given out on the host, so nothing here waits for a device.

    Attributes:
        heads: KV heads.
        device: where the pages are.
        data: ``[num_kv_heads, places]`` float32; a request's tokens are neighbours in it.

    """

    heads: int
    device: torch.device
    data: torch.Tensor = field(init=False)
    _free: list[tuple[int, int]] = field(default_factory=list)  # start and end, ascending

    def __post_init__(self) -> None:
        self.data = torch.zeros(self.heads, 0, device=self.device, dtype=torch.float32)

    def take(self, places: int) -> int:
        """The start of so many free places in a row, all zero."""
        for i, (start, end) in enumerate(self._free):
            if end - start >= places:
                self._free[i : i + 1] = [(start + places, end)] if end - start > places else []
                self.data[:, start : start + places].zero_()
                return start
        have = self.data.shape[1]
        grown = torch.zeros(
            self.heads, max(2 * have, have + places), device=self.device, dtype=torch.float32
        )
        grown[:, :have] = self.data
        self.data = grown
        self._add(have, grown.shape[1])
        return self.take(places)

    def give_back(self, start: int, end: int) -> None:
        """Let others have these places; the memory, where nobody has any."""
        self._add(start, end)
        if self._free == [(0, self.data.shape[1])]:
            self._free, self.data = [], self.data.new_zeros(self.heads, 0)

    def _add(self, start: int, end: int) -> None:
        """Neighbouring free places become one."""
        joined: list[tuple[int, int]] = []
        for one in sorted([*self._free, (start, end)]):
            if joined and joined[-1][1] == one[0]:
                joined[-1] = joined[-1][0], one[1]
            else:
                joined.append(one)
        self._free = joined


@dataclass
class Room:
    """The places of one request, given back with it.

    Attributes:
        buffer: of the layer.
        start: its first place.
        size: its places.

    """

    buffer: MassBuffer
    start: int = 0
    size: int = 0

    def hold(self, tokens: int) -> None:
        """Have at least so many places; new ones are zero."""
        if tokens <= self.size:
            return
        size = -(-max(tokens, self.size * 5 // 4) // STEP) * STEP
        start = self.buffer.take(size)
        old = self.view(self.size)
        self.buffer.data[:, start : start + old.shape[1]] = old
        self._leave(self.start)
        self.start, self.size = start, size

    def view(self, tokens: int) -> torch.Tensor:
        """The mass of the first tokens, ``[num_kv_heads, tokens]``."""
        return self.buffer.data[:, self.start : self.start + tokens]

    def keep(self, source: torch.Tensor) -> None:
        """Let token i be what token ``source[head, i]`` was; what lies behind them is zero.

        So is what has a source below 0.
        """
        kept = self.view(self.size).gather(1, source.clamp(min=0)).masked_fill_(source < 0, 0.0)
        size = -(-source.shape[1] // STEP) * STEP
        if 2 * size <= self.size:
            self._leave(self.start + size)
            self.size = size
        self.view(self.size)[:, source.shape[1] :].zero_()
        self.view(source.shape[1]).copy_(kept)

    def _leave(self, start: int) -> None:
        """Give back what begins at ``start``."""
        if self.start + self.size > start:
            self.buffer.give_back(start, self.start + self.size)

    def __del__(self) -> None:
        self._leave(self.start)
