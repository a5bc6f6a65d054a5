"""Makes sure that a policy, once asked for, is in force, or nothing is served.

vLLM logs a general plugin's import error and goes on, and chooses other backends for some
models. A logits processor is the official object that exists in every worker and sees every
request's parameters; this one leaves the logits alone, and keeps ``rows`` up to date.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SlotLogitsProcessor

from cache_policies.errors import PolicyError
from cache_policies.vllm_plugin import BACKEND_PATH, FULL_ATTENTION, GPU_BACKEND_PATH
from cache_policies.vllm_plugin.config import (
    POLICY_KEY,
    refuse_engine,
    refuse_method,
    settings,
)
from cache_policies.vllm_plugin.frontend import check_request, note_engine
from cache_policies.vllm_plugin.hosts import watch_hosts
from cache_policies.vllm_plugin.kinds import refuse_other_layers
from cache_policies.vllm_plugin.rows import Rows, forget_removed, rows_of
from cache_policies.vllm_plugin.seeds import keep_generators_of_incomplete_prompts

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams


class PolicyGuard(LogitsProcessor, SlotLogitsProcessor):  # type: ignore[misc]
    """Entry point ``vllm.logits_processors``, of both model runners.

    V1 makes it with a device and whether memory is pinned, and tells it of rows of the batch; V2
    with its table of requests, and tells it of slots in that.
    """

    def __init__(self, vllm_config: VllmConfig, *given: Any) -> None:
        self.rows: Rows | None = None
        self._unchecked: VllmConfig | None = None
        v2 = vllm_config.use_v2_model_runner
        self.table = given[0] if v2 else None
        if not v2:
            keep_generators_of_incomplete_prompts()
        note_engine(vllm_config)
        model = vllm_config.model_config
        if (model.is_hybrid or model.is_attention_free) and current_platform.is_cpu():
            from cache_policies.vllm_plugin.mamba import register_layers  # imports the layers

            register_layers()
        asked = settings(vllm_config)
        if asked is None:
            return
        refuse_engine(vllm_config)
        refuse_method(asked.policy.method, vllm_config)
        _refuse_other_backend(vllm_config)
        if v2:  # which has made the model
            refuse_other_layers(vllm_config)
        else:
            self._unchecked = vllm_config
        self.rows = rows_of(vllm_config)
        if v2:
            self.rows.table = self.table
            forget_removed()
        watch_hosts(vllm_config)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        check_request(sampling_params)

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        if self._unchecked is not None:
            refuse_other_layers(self._unchecked)
            self._unchecked = None
        if self.rows is not None:
            self.rows.update(batch_update)
            return
        for _, params, *_rest in batch_update.added if batch_update else ():
            _refuse_without_policy(params)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        if self.rows is None:
            _refuse_without_policy(sampling_params)
        else:
            assert self.table is not None
            prompt = int(self.table.prompt_len.np[req_idx])
            self.rows.take_slot(req_idx, sampling_params, prompt)
        return False

    def apply(self, logits: torch.Tensor, *_: Any) -> torch.Tensor:
        return logits


def _refuse_other_backend(vllm_config: VllmConfig) -> None:
    """Refuse to serve with another attention than ours, which would accept and ignore the policy.

    Raises:
        PolicyError: naming the backend and the way out.

    """
    on_cpu = current_platform.is_cpu()
    ours = AttentionBackendEnum.CPU_ATTN if on_cpu else AttentionBackendEnum.CUSTOM
    active = ours.get_path() if ours.is_overridden() else "vLLM's own"
    if active != (BACKEND_PATH if on_cpu else GPU_BACKEND_PATH):
        raise PolicyError(
            f"the cache policy is not active in this worker: its attention backend is "
            f"{active}. Is kvthrift missing from VLLM_PLUGINS, or did its plugin fail to load?"
        )
    chosen = vllm_config.attention_config.backend_per_kind.get(FULL_ATTENTION)
    if not on_cpu and chosen is not ours:
        raise PolicyError(
            "the cache policy is not active in this worker: vLLM chooses its attention backend "
            "itself. Start with kvthrift serve, or give --attention-config "
            f'\'{{"backend_per_kind": {{"{FULL_ATTENTION}": "{ours.name}"}}}}\''
        )


def _refuse_without_policy(params: SamplingParams) -> None:
    """A server refuses this at admission; a script may come here."""
    if POLICY_KEY in (params.extra_args or {}):
        raise PolicyError(f"{POLICY_KEY} of a request: the engine has no cache policy")
