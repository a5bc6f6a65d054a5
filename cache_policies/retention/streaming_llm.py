"""StreamingLLM: the first tokens and the most recent ones.

Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks",
arXiv 2309.17453. The original caches keys before rotary embedding and rotates them by their
index in the cache. Distances inside the window are the same either way, so
``positions=cache`` only has to rotate the sinks on, by as many positions as were dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from cache_policies.errors import PolicyError
from cache_policies.retention.base import BOUNDED, FULL, Retention

if TYPE_CHECKING:
    import torch

    from cache_policies.retention.seen import Seen

POSITIONS = ("original", "cache")


@dataclass(frozen=True)
class StreamingLLM(Retention):
    """Attention sinks and a window.

    Attributes:
        sinks: first tokens kept.
        window: last tokens kept.
        ratio: or the share of the prompt that both make up.
        positions: ``original`` leaves the sinks where they are in the text; ``cache`` lets
            them follow the window, as if the dropped tokens had never been.
        prefill: ``bounded`` or ``full``.
        interval: decode tokens between two cuts.

    """

    name: ClassVar[str] = "streaming-llm"
    keeps: ClassVar[str] = "the first tokens and the most recent ones"
    loses: ClassVar[str] = "everything between them"
    PREFILL: ClassVar[tuple[str, ...]] = (BOUNDED, FULL)
    DECODE_CUTS: ClassVar[bool] = True

    sinks: int = 4
    window: int = 1020
    positions: str = POSITIONS[0]

    @classmethod
    def build(cls, given: dict[str, Any]) -> Self:
        if "sinks" in given and "window" not in given and "ratio" not in given:
            raise PolicyError("window is not given beside sinks (or ratio)")
        return super().build(given)

    @classmethod
    def size_names(cls) -> tuple[str, ...]:
        return ("window",)

    def check(self) -> None:
        if self.sinks < 0 or self.window < 1:
            raise PolicyError(f"sinks={self.sinks} is below 0 or window={self.window} below 1")
        if self.positions not in POSITIONS:
            raise PolicyError(f"positions={self.positions} is not one of {', '.join(POSITIONS)}")

    @property
    def protected_tokens(self) -> int:
        return self.sinks

    @property
    def budget_tokens(self) -> int:
        return self.sinks + self.window

    def score(self, seen: Seen) -> torch.Tensor:
        return seen.position.float()

    def protected(self, seen: Seen) -> torch.Tensor:
        return seen.position < self.sinks

    @property
    def rotates(self) -> bool:
        return self.positions == "cache"
