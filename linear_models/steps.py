"""What vLLM's metadata of a step says to a recurrence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID

from cache_policies.errors import PolicyError
from linear_models.scans.batch import Batch

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backends.mamba_attn import BaseMambaAttentionMetadata


def refuse_speculation(vllm_config: VllmConfig) -> None:
    """Refuse drafts: a state that has seen a token that is then rejected cannot go back.

    Raises:
        PolicyError: the engine has them.

    """
    if vllm_config.speculative_config:
        model = vllm_config.model_config.model
        raise PolicyError(
            f"speculative decoding with {model}, whose states for CPUs cannot go back a token; "
            "drop --speculative-config"
        )


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


def refuse_ranks(vllm_config: VllmConfig) -> None:
    """Refuse tensor parallelism, for a model whose recurrences are not split.

    Raises:
        PolicyError: naming the flag.

    """
    if vllm_config.parallel_config.tensor_parallel_size > 1:
        raise PolicyError(
            f"{vllm_config.model_config.model} runs on one rank: its recurrences are not split; "
            "drop --tensor-parallel-size"
        )
