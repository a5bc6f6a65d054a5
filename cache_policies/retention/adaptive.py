"""Budgets by head: the KV heads of a layer compete for the pages that a request keeps of it.

Source: Feng et al., "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for
Efficient LLM Inference", arXiv 2407.11550: the scores of all heads of a layer compete for one
budget, after every head has its best tokens up to a safeguard share of the uniform budget.

Difference: heads are given whole pages, so that the request owns as many pages as with uniform
heads. Behind its pages every head keeps as many tokens as the others: those that fill no page of
a uniform head. A head's next page is worth the scores of the best tokens that it has no page for
yet; the pages worth most are kept, by whichever head. With pages of one token that is the
original. Every head keeps a page, and the protected tokens; under tensor parallelism the heads of
a rank compete among themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch

SAFEGUARD = 0.2  # share of the uniform budget that every head keeps


@dataclass(frozen=True)
class Budgets:
    """Pages of the heads of a layer after a cut, as far as the host knows them.

    Attributes:
        page_tokens: tokens of a page.
        pages: full pages that a head keeps on average.
        tail: tokens that every head keeps behind its full pages, fewer than a page.
        least: full pages that every head keeps.
        most: full pages that no head keeps more of.

    """

    page_tokens: int
    pages: int
    tail: int
    least: int
    most: int

    @classmethod
    def of(cls, heads: int, keep: int, candidates: int, page_tokens: int) -> Budgets:
        """Budgets of ``heads`` KV heads that keep ``keep`` of so many candidates on average."""
        pages, tail = divmod(keep, page_tokens)
        least = min(pages, max(1, ceil((SAFEGUARD * keep - tail) / page_tokens)))
        most = min((candidates - tail) // page_tokens, heads * pages - (heads - 1) * least)
        return cls(page_tokens, pages, tail, least, most)

    @property
    def places(self) -> int:
        """Tokens that a head with the most pages keeps."""
        return self.most * self.page_tokens + self.tail

    @property
    def lead(self) -> int:
        """Of these, tokens above the average."""
        return (self.most - self.pages) * self.page_tokens

    def divide(self, score: torch.Tensor) -> torch.Tensor:
        """Full pages of every head, ``[num_kv_heads]`` int64; their mean is ``pages``.

        Args:
            score: ``[num_kv_heads, n]`` float32; infinite for tokens that must stay, minus
                infinity where a head has no token.

        """
        heads, finite = score.shape[0], torch.finfo(torch.float32)
        needed = (score == torch.inf).sum(1) - self.tail + self.page_tokens - 1
        needed = (needed // self.page_tokens).clamp(min=self.least)[:, None]
        there = ((score > -torch.inf).sum(1) - self.tail)[:, None] // self.page_tokens
        best = score.sort(dim=1, descending=True).values[:, self.tail : self.places]
        best = best.double().clamp(finite.min, finite.max)  # what overflows here is no number
        worth = best.unflatten(1, (self.most, self.page_tokens)).sum(2)
        number = torch.arange(self.most, device=score.device)
        worth = worth.masked_fill(number < needed, torch.inf)
        worth = worth.masked_fill(number >= there, -torch.inf)
        # A head's pages are worth less and less: taking the best takes its first ones.
        owner = worth.flatten().topk(heads * self.pages).indices // max(1, self.most)
        return (owner == torch.arange(heads, device=score.device)[:, None]).sum(1)

    def select(self, score: torch.Tensor) -> torch.Tensor:
        """The tokens of every head that stay, ``[num_kv_heads, places]`` int64.

        A row ends with the head's tokens, ascending, and begins with -1 for those it lacks.

        Args:
            score: as for ``divide``.

        """
        heads, count = score.shape
        token = torch.arange(count, device=score.device).expand(heads, -1)
        best = score.argsort(dim=1, descending=True)
        rank = torch.empty_like(best).scatter_(1, best, token)
        stays = rank < (self.divide(score) * self.page_tokens + self.tail)[:, None]
        behind = stays.flip(1).cumsum(1).flip(1)  # how many stay from each token on
        place = torch.where(stays, self.places - behind, self.places)  # the others: a last column
        kept = torch.full((heads, self.places + 1), -1, device=score.device)
        return kept.scatter_(1, place, token)[:, : self.places]
