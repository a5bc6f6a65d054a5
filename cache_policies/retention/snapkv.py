"""SnapKV: what the last queries of the prompt look at.

Source: Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation",
arXiv 2404.14469. Differences: max pooling is taken over the mean of the query heads of a KV
head, not per query head (for average pooling the order does not matter); sinks are not
protected, as in the original.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn import functional

from cache_policies.errors import PolicyError
from cache_policies.retention.base import Budgeted

if TYPE_CHECKING:
    from cache_policies.retention.seen import Seen

POOLING = ("avg", "max")
WIDEST_KERNEL = 129  # tokens pooled around each one


def check_kernel(kernel: int) -> None:
    """Refuse a pooling without a middle, or one that would take far more time than the rest.

    Raises:
        PolicyError: naming the range.

    """
    if not 1 <= kernel <= WIDEST_KERNEL or kernel % 2 == 0:
        raise PolicyError(f"kernel={kernel} is not odd and between 1 and {WIDEST_KERNEL}")


@dataclass(frozen=True)
class SnapKV(Budgeted):
    """Tokens with most pooled attention from the observation window.

    Attributes:
        budget: tokens kept per KV head, the window included.
        ratio: or their share of the prompt.
        window: last tokens of the prompt, which observe and are kept.
        kernel: tokens pooled around each one; odd, at most 129.
        pooling: ``avg`` or ``max``.

    """

    name: ClassVar[str] = "snapkv"
    keeps: ClassVar[str] = "what the end of the prompt attends to, and every answer token"
    loses: ClassVar[str] = "what only a later question would need"
    COMPARABLE: ClassVar[bool] = True

    sinks: int = 0
    kernel: int = 5
    pooling: str = POOLING[0]

    def check(self) -> None:
        super().check()
        check_kernel(self.kernel)
        if self.pooling not in POOLING:
            raise PolicyError(f"pooling={self.pooling} is not one of {', '.join(POOLING)}")

    def first_query(self, before: int, after: int, prompt: int, cuts: bool) -> int | None:
        first = max(before, prompt - self.window)
        return first if before < prompt and first < after else None

    def score(self, seen: Seen) -> torch.Tensor:
        # What the window itself got does not reach its neighbours through the pooling.
        before = seen.mass[:, : seen.prompt_end - self.window]
        pool = functional.avg_pool1d if self.pooling == "avg" else functional.max_pool1d
        score = torch.zeros_like(seen.mass)
        score[:, : before.shape[1]] = pool(before, self.kernel, 1, self.kernel // 2)
        return score
