"""H2O: the tokens that got most attention from all queries so far, and the recent ones.

Source: Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large
Language Models", arXiv 2306.14048. The sum favours early tokens, which more queries see; that
is the method. The budget may be cut every ``interval`` tokens instead of at every one.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, ClassVar

from cache_policies.errors import PolicyError
from cache_policies.retention.base import BOUNDED, FULL, Retention

if TYPE_CHECKING:
    import torch

    from cache_policies.retention.seen import Seen


@dataclass(frozen=True)
class H2O(Retention):
    """Heavy hitters and recent tokens.

    Attributes:
        heavy: tokens kept for their accumulated attention.
        recent: last tokens kept.
        ratio: or the share of the prompt that both make up, half each.
        prefill: ``full`` or ``bounded``.
        interval: decode tokens between two cuts.

    """

    name: ClassVar[str] = "h2o"
    keeps: ClassVar[str] = "tokens with most accumulated attention, and the recent ones"
    loses: ClassVar[str] = "tokens few queries attended to, even if a later one would"
    PREFILL: ClassVar[tuple[str, ...]] = (FULL, BOUNDED)
    DECODE_CUTS: ClassVar[bool] = True
    NEEDS_EVERY_QUERY: ClassVar[bool] = True
    COMPARABLE: ClassVar[bool] = True

    heavy: int = 512
    recent: int = 512

    @classmethod
    def size_names(cls) -> tuple[str, ...]:
        return ("heavy", "recent")

    def check(self) -> None:
        if self.heavy < 1 or self.recent < 1:
            raise PolicyError(f"heavy={self.heavy} or recent={self.recent} is below 1")

    @property
    def protected_tokens(self) -> int:
        return 1

    @property
    def budget_tokens(self) -> int:
        return self.heavy + self.recent

    def first_query(self, before: int, after: int, prompt: int, cuts: bool) -> int | None:
        return before

    def score(self, seen: Seen) -> torch.Tensor:
        return seen.mass

    def protected(self, seen: Seen) -> torch.Tensor:
        recent = ceil(self.kept(seen.prompt) / 2) if self.ratio else self.recent
        return seen.position >= seen.end - recent
