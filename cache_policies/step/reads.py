"""Which store pages the queries of a step read: a choice a request, or one a block of queries."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from cache_policies.kernels.contract import Reads
from cache_policies.kernels.counts import beside
from cache_policies.retrieval.sparse_prefill import QUERY_BLOCK

if TYPE_CHECKING:
    from cache_policies.kernels.contract import Batch
    from cache_policies.retrieval import SparsePrefill
    from cache_policies.step.cut import Layer, Tokens


@dataclass(frozen=True)
class Choice:
    """What some of a request's queries read.

    Attributes:
        seq: index in the batch.
        blocks: blocks of ``QUERY_BLOCK`` queries, counted from the step's first; None: all
            queries alike.
        pages: ``[blocks or 1, num_kv_heads, width]`` int32, ascending.
        count: ``[blocks, num_kv_heads]`` int32, how many of them; a number where it is known
            on the host.

    """

    seq: int
    blocks: range | None
    pages: torch.Tensor
    count: torch.Tensor | int


def sparse_choice(
    sparse: SparsePrefill,
    layer: Layer,
    batch: Batch,
    tokens: Tokens,
    seq: int,
    blocks: range,
    fresh: int,
) -> Choice:
    """Compare samples of the blocks' queries with every key; choose pages."""
    table = torch.tensor(
        [(seq, b * QUERY_BLOCK, min(QUERY_BLOCK, fresh - b * QUERY_BLOCK)) for b in blocks],
        dtype=torch.int32,
    )
    mass, rest = layer.kernel.page_mass(
        layer.pages, batch, tokens.query, tokens.key, table, sparse.samples
    )
    pages = -(-int(batch.host.stored[seq]) // layer.layout.page_tokens)
    chosen, count = sparse.choose(mass[..., :pages], rest, layer.layout.page_tokens)
    return Choice(seq, blocks, chosen, count)


def unread_pages(choice: Choice, pages: int, fresh: int) -> torch.Tensor:
    """Store pages that the step's queries do not read, summed over queries and KV heads."""
    assert choice.blocks is not None
    assert isinstance(choice.count, torch.Tensor)
    queries = [min(QUERY_BLOCK, fresh - b * QUERY_BLOCK) for b in choice.blocks]
    (weight,) = beside([torch.tensor(queries, dtype=torch.int32)], choice.count.device)
    return ((pages - choice.count).sum(1) * weight).sum()


def reads_of(choices: list[Choice], fresh: list[int]) -> Reads | None:
    """Lists for the kernel.

    Args:
        choices: at most one a request; the queries they leave out read everything.
        fresh: tokens of every request in the step.

    Returns:
        None where everything is read.

    """
    if not choices:
        return None
    heads, device = choices[0].pages.shape[1], choices[0].pages.device
    block = QUERY_BLOCK if any(choice.blocks is not None for choice in choices) else 0
    lists = [-(-count // block) if block else 1 for count in fresh]
    begin = [0, *accumulate(lists)]
    (first,) = beside([torch.tensor(begin[:-1], dtype=torch.int32)], device)
    width = max(choice.pages.shape[-1] for choice in choices)
    pages = torch.zeros(begin[-1], heads, width, dtype=torch.int32, device=device)
    count = torch.full((begin[-1], heads), -1, dtype=torch.int32, device=device)
    for choice in choices:
        blocks = choice.blocks or range(lists[choice.seq])
        span = slice(begin[choice.seq] + blocks.start, begin[choice.seq] + blocks.stop)
        pages[span, :, : choice.pages.shape[-1]] = choice.pages
        count[span] = choice.count
    return Reads(pages, count, first, block)
