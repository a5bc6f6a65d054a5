"""What vLLM's metadata of a step says to a recurrence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID

from linear_models.scans.batch import Batch

if TYPE_CHECKING:
    from vllm.v1.attention.backends.mamba_attn import BaseMambaAttentionMetadata


def batch_of(metadata: BaseMambaAttentionMetadata) -> Batch:
    """Requests of a step: those that decode first, each a request of one token, then prompts.

    Made once a step: layers of a group share the metadata, which keeps it.
    """
    made: Batch | None = getattr(metadata, "kvthrift_batch", None)
    if made is None:
        made = metadata.kvthrift_batch = _batch(metadata)
    return made


def _batch(metadata: BaseMambaAttentionMetadata) -> Batch:
    decodes = metadata.num_decodes
    starts = [torch.arange(decodes, dtype=torch.int32)]
    slots, has = [], [torch.ones(decodes, dtype=torch.bool)]
    if decodes:
        slots.append(metadata.state_indices_tensor_d[:decodes, 0])
    if metadata.num_prefills:
        starts.append(metadata.query_start_loc_p + decodes)
        slots.append(metadata.state_indices_tensor_p)
        has.append(metadata.has_initial_states_p)
    else:
        starts.append(torch.tensor([decodes], dtype=torch.int32))
    found = torch.cat(slots).to(torch.int32)
    return Batch(
        torch.cat(starts).to(torch.int32),
        torch.where(found == NULL_BLOCK_ID, -1, found),
        torch.cat(has),
    )
