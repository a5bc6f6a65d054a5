"""What engines of these models do not have; vLLM asks before any of their processes starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.model_executor.models.config import MambaModelConfig, VerifyAndUpdateConfig

from cache_policies.errors import PolicyError

if TYPE_CHECKING:
    from vllm.config import VllmConfig


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


class BesideAttention(VerifyAndUpdateConfig):  # type: ignore[misc]
    """For models with attention too, whose states vLLM sizes by itself."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        refuse_ranks(vllm_config)
        refuse_speculation(vllm_config)


class WithoutAttention(MambaModelConfig):  # type: ignore[misc]
    """For models of states only."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        BesideAttention.verify_and_update_config(vllm_config)
        super().verify_and_update_config(vllm_config)
