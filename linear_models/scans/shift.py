"""Token shift (arXiv 2305.13048): beside every token the one before it, of the same request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from linear_models.scans.batch import Batch


def token_shift(x: torch.Tensor, states: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The token before each one; a request's first has that of the step before, or zeros.

    Args:
        x: ``[tokens, channels]``.
        states: ``[slots, channels]``, the last token of a request; written.
        batch: requests of the step.

    Returns:
        ``[tokens, channels]``.

    """
    first, after = batch.query_start[:-1].long(), batch.query_start[1:].long()
    shifted = torch.empty_like(x)
    shifted[1:] = x[:-1]
    kept = batch.slots >= 0
    slots = batch.slots.clamp(min=0).long()
    known = (batch.has_state & kept)[:, None]
    shifted[first] = torch.where(known, states[slots].to(x.dtype), 0)
    states[slots[kept]] = x[after[kept] - 1].to(states.dtype)
    return shifted
