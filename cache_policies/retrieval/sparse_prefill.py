"""Sparse prefill: a block of the prompt's queries reads only the store pages that matter to it.

Source: Zhu et al., "SampleAttention: Near-Lossless Acceleration of Long Context LLM Inference
with Adaptive Structured Sparse Attention", arXiv 2406.15486: a few queries of a block are compared
with every key, and the keys that together get ``coverage`` of their attention are read. The
threshold on the cumulative attention is FlexPrefill's too (arXiv 2502.20766). Here keys are
chosen by pages, per KV head; tokens of the running chunk and the ring are always read.

Nothing is dropped: decode steps read every page. What the prompt's later tokens are computed from
is an approximation, so their pages are not published to the prefix cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from cache_policies.errors import PolicyError
from cache_policies.parameters import Value, parameters, shown

QUERY_BLOCK = 128  # queries that share a choice


@dataclass(frozen=True)
class SparsePrefill:
    """Which store pages the queries of a prompt read.

    Attributes:
        coverage: share of the sampled queries' attention that the pages read must get, the
            running chunk and the ring counted in.
        topk: or so many pages for every block and KV head; 0: by coverage.
        samples: queries of a block that are compared with every key.
        exact: queries at earlier positions read everything, so a shorter prompt is exact.
        init: first tokens, always read; whole pages of them.
        window: the prompt's last queries read everything; whole blocks of them.

    """

    name: ClassVar[str] = "sparse-prefill"
    keeps: ClassVar[str] = "every token; the prompt's queries read the pages with most attention"
    loses: ClassVar[str] = "what the other pages add to the prompt's hidden states"
    PREFILL: ClassVar[tuple[str, ...]] = ("sparse",)

    coverage: float = 0.95
    topk: int = 0
    samples: int = 8
    exact: int = 2048
    init: int = 128
    window: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.coverage < 1:
            raise PolicyError(f"coverage={self.coverage} is not above 0 and below 1")
        if not 1 <= self.samples <= QUERY_BLOCK:
            raise PolicyError(f"samples={self.samples} is not between 1 and {QUERY_BLOCK}")
        for name in ("topk", "exact", "init"):
            if getattr(self, name) < 0:
                raise PolicyError(f"{name}={getattr(self, name)} is below 0")
        if self.window < 1:
            raise PolicyError(f"window={self.window} is below 1")

    @classmethod
    def settable(cls) -> dict[str, Value]:
        """Parameters a user may set, with their defaults."""
        return parameters(cls)

    def __str__(self) -> str:
        return shown(self.name, self, self.settable())

    def blocks(self, before: int, fresh: int, prompt: int) -> range:
        """Blocks of a step's queries that choose; the others read everything.

        Args:
            before: tokens computed before the step.
            fresh: tokens of the step.
            prompt: tokens of the prompt.

        Returns:
            Numbers of blocks of ``QUERY_BLOCK`` queries, counted from the step's first.

        """
        first = -(-max(0, self.exact - before) // QUERY_BLOCK)
        last = max(0, min(fresh, prompt - self.window - before)) // QUERY_BLOCK
        return range(min(first, last), last)

    def choose(
        self, mass: torch.Tensor, rest: torch.Tensor, page_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages to read.

        Args:
            mass: ``[blocks, num_kv_heads, pages]`` float32, mean share of the sampled queries'
                attention that each page gets.
            rest: ``[blocks, num_kv_heads]``, that of the tokens that are always read.
            page_tokens: tokens of a page.

        Returns:
            pages ``[blocks, num_kv_heads, pages]`` int32 and how many of them count
            ``[blocks, num_kv_heads]`` int32: the first ones, ascending.

        """
        pages = mass.shape[-1]
        always = min(-(-self.init // page_tokens), pages)
        wanted = mass.clone()
        wanted[..., :always] = 2.0  # above any share
        order = wanted.argsort(dim=-1, descending=True, stable=True)
        share = mass.gather(-1, order)
        reached = rest[..., None] + share.cumsum(-1) - share  # before the page is read
        whole = mass.sum(-1, keepdim=True) + rest[..., None]  # below 1 beside learned sinks
        needed = (reached < self.coverage * whole).sum(-1)
        if self.topk:
            needed = torch.full_like(needed, min(self.topk + always, pages))
        needed = needed.clamp(min=always)
        rank = torch.arange(pages, device=mass.device)
        chosen = torch.where(rank < needed[..., None], order, pages).sort(dim=-1).values
        return chosen.clamp(max=max(0, pages - 1)).int(), needed.int()
