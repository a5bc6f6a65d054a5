"""Tokens that go to other places of their requests: what a cut asks of a kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import torch

if TYPE_CHECKING:
    from cache_policies.kernels.contract import Batch, Kernel


@dataclass(frozen=True)
class Moves:
    """Tokens of requests that go to other places of their rows.

    Attributes:
        source: the batch of ``Kernel.read``.
        target: that of ``Kernel.write``. See ``mixes_pages``.
        index: ``[num_kv_heads, count]`` int32, as for ``Kernel.write``.
        number: same shape, the token of ``source`` that comes there: none moves backwards
            (``number >= index``); below 0 where ``index`` is.
        start: ``[num_seqs + 1]`` int32 on the host, as for ``Kernel.read``.

    """

    source: Batch
    target: Batch
    index: torch.Tensor
    number: torch.Tensor
    start: torch.Tensor

    def mixes_pages(self, page_tokens: int) -> bool:
        """Whether a request's store goes to some of its own pages, but in other rows.

        A page is then written while tokens of it are still to be read: a prompt whose request has
        no pages to spare, and begins at another row once it is cut. In the same rows no token is
        written over before it is read, since none moves backwards; elsewhere there is none.
        """
        source, target = self.source.host, self.target.host
        begin, to = source.store_row, target.store_row
        end, to_end = (
            batch.store_row + (batch.stored + page_tokens - 1) // page_tokens
            for batch in (source, target)
        )
        writes = (to < to_end) & (np.diff(self.start.numpy()) > 0)
        return bool((writes & (to != begin) & (to < end) & (begin < to_end)).any())

    def wrong(self, page_tokens: int) -> str:
        """What forbids a kernel to move tokens one after the other; empty: nothing."""
        forwards = (self.number >= self.index) & ((self.number < 0) == (self.index < 0))
        if not bool(forwards.all()):
            return "a token moves backwards"
        return "pages are mixed" if self.mixes_pages(page_tokens) else ""


@runtime_checkable
class Moving(Protocol):
    """A kernel that moves tokens itself."""

    def move(
        self, pages: torch.Tensor, key: torch.Tensor, value: torch.Tensor, moves: Moves
    ) -> None:
        """Read tokens and write them to other places.

        Tokens that share bytes of a page, where these are whole and stay together, keep these
        bytes: no cut rounds them again. Others are decoded and encoded.

        Args:
            pages: as for ``Kernel.attend``, written.
            key: the step's fresh keys.
            value: the step's fresh values.
            moves: what goes where; no pages are mixed.

        """


def move(
    kernel: Kernel,
    page_tokens: int,
    pages: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    moves: Moves,
) -> None:
    """``Moving.move``; by way of floats, where a group is rounded again, if the kernel cannot."""
    if isinstance(kernel, Moving) and not moves.mixes_pages(page_tokens):
        kernel.move(pages, key, value, moves)
    else:
        move_rows(kernel, pages, key, value, moves)


def move_rows(
    kernel: Kernel, pages: torch.Tensor, key: torch.Tensor, value: torch.Tensor, moves: Moves
) -> None:
    """Move tokens by way of floats."""
    rows = kernel.read(pages, moves.source, key, value, moves.number, moves.start)
    kernel.write(pages, moves.target, moves.index, *rows, moves.start)


def disorder(index: torch.Tensor, start: torch.Tensor, batch: Batch, page_tokens: int) -> str:
    """What is wrong with places that tokens must have who share scales; empty: nothing.

    Args:
        index: ``[num_kv_heads, count]`` int32: 0, 1, 2, ... of each request, all of it or none;
            below 0 for all tokens of first pages that a head lacks.
        start: ``[num_seqs + 1]`` int32.
        batch: the counts when they are written.
        page_tokens: tokens of a page.

    """
    counts, held = start.diff(), batch.stored + batch.ring
    if not bool(((counts == held) | (counts == 0)).all()):
        return "write all tokens"
    order = torch.arange(index.shape[1]) - start[:-1].repeat_interleave(counts)
    lacks = (index < 0) & (order < batch.stored.repeat_interleave(counts))
    if not bool(((index == order) | lacks).all()):
        return "write in order"
    follows = order % page_tokens > 0
    breaks = lacks[:, 1:] & ~lacks[:, :-1] & (order[1:] > 0)
    splits = (lacks[:, 1:] != lacks[:, :-1]) & follows[1:]
    return "write whole pages" if bool((breaks | splits).any()) else ""
