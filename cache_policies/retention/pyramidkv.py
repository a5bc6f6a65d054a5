"""PyramidKV: SnapKV with budgets that fall linearly over the layers, at the same total.

Source: Cai et al., "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information
Funneling", arXiv 2406.02069. All layers of a request share its block-table row, so the pool
gives it the pages of its largest layer: what it saves in quality it does not save in memory
against SnapKV of the same mean budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache_policies.errors import PolicyError
from cache_policies.retention.snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV whose first layers keep more than its last ones.

    Attributes:
        budget: mean over the layers of the tokens kept per KV head.
        beta: the last layer keeps 1/beta of the mean, beside the window.

    """

    name: ClassVar[str] = "pyramidkv"
    keeps: ClassVar[str] = "as snapkv, more in the first layers than in the last"

    beta: int = 20

    def check(self) -> None:
        super().check()
        if self.beta < 1:
            raise PolicyError(f"beta={self.beta} is below 1")

    def kept(self, prompt: int, layer: int = 0, layers: int = 1) -> int:
        free = super().kept(prompt) - self.protected_tokens
        if layers == 1:
            return free + self.protected_tokens
        last = free // self.beta
        first = 2 * free - last
        return first - (first - last) * layer // (layers - 1) + self.protected_tokens
