"""InfLLM: blocks found by the keys of their most attended tokens.

Source: Xiao et al., "InfLLM: Training-Free Long-Context Extrapolation for LLMs with an
Efficient Context Memory", arXiv 2402.04617. A block is a page. Differences: keys stay at their
true positions, so texts must fit the trained length; a token's local attention is counted over
the queries of about the next 512 tokens, not over the whole local window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cache_policies.errors import PolicyError
from cache_policies.retrieval.base import Retrieval

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class InfLLM(Retrieval):
    """Sinks, a local window and the blocks whose representatives match the query.

    Attributes:
        repr_topk: representative tokens of a block.

    """

    name: ClassVar[str] = "infllm"
    keeps: ClassVar[str] = "every token; a query reads sinks, window and the best blocks"
    loses: ClassVar[str] = "nothing from memory; what the chosen blocks lack is not seen"
    NEEDS_EVERY_QUERY: ClassVar[bool] = True
    OBSERVES: ClassVar[int] = 512

    repr_topk: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.repr_topk <= 32:
            raise PolicyError(f"repr_topk={self.repr_topk} is not between 1 and 32")

    def summarize(self, keys: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
        best = mass.topk(self.repr_topk, dim=2).indices[..., None].expand(-1, -1, -1, keys.shape[3])
        return keys.gather(2, best).mean(2, keepdim=True)

    def score(self, query: torch.Tensor, summary: torch.Tensor) -> torch.Tensor:
        # One choice for the layer: the sum over all heads.
        match = query.sum(1)[:, None] @ summary[:, :, 0].transpose(1, 2)
        return match.sum(0).expand(query.shape[0], -1)
