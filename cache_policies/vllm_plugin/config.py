"""The plugin's settings, read from vLLM's ``--additional-config``, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CompilationMode
from vllm.platforms import current_platform

from cache_policies.errors import PolicyError
from cache_policies.policy import Method, Policy, parse, parse_method
from cache_policies.retention.rope import refuse_rotary
from cache_policies.spelling import refuse_near

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

POLICY_KEY, KERNEL_KEY = "cache_policy", "cache_kernel"
# set by the scheduler, where workers cannot count them: a prompt's tokens, ``Engine.room``
PROMPT_KEY, ROOM_KEY = "cache_prompt_tokens", "cache_room"
SCHEDULERS = "cache_policies.vllm_plugin.scheduler"
SCHEDULER, ASYNC_SCHEDULER = f"{SCHEDULERS}.PolicyScheduler", f"{SCHEDULERS}.PolicyAsyncScheduler"


@dataclass(frozen=True)
class Settings:
    """What the user asked for.

    Attributes:
        policy: the engine's cache policy.
        kernel: ``auto``, ``cpu``, ``triton`` or ``reference``.

    """

    policy: Policy
    kernel: str


def settings(vllm_config: VllmConfig) -> Settings | None:
    """The plugin's settings; None where no policy is given, and vLLM stays as it is.

    Raises:
        PolicyError: the policy or kernel is not valid, or a key is almost one of ours.

    """
    extra = vllm_config.additional_config
    if not isinstance(extra, dict):
        return None
    refuse_near(extra, (POLICY_KEY, KERNEL_KEY), "--additional-config")
    if POLICY_KEY not in extra:
        if KERNEL_KEY in extra:
            raise PolicyError(f"{KERNEL_KEY} is given without {POLICY_KEY}")
        return None
    return _settings(extra[POLICY_KEY], extra.get(KERNEL_KEY, "auto"))


@lru_cache
def _settings(policy: str, kernel: str) -> Settings:
    return Settings(parse(policy), kernel)


def method_of(sampling_params: SamplingParams | None, default: Method | None) -> Method:
    """What a request chose in ``vllm_xargs``, or the engine's default (None: nothing is lost).

    Raises:
        PolicyError: as ``parse_method``; refused at admission, so not later.

    """
    asked = (sampling_params.extra_args or {}).get(POLICY_KEY) if sampling_params else None
    return (default or Method()) if asked is None else parse_method(asked)


def takes_methods(vllm_config: VllmConfig) -> bool:
    """Whether a request may choose a method; see ``refuse_method``."""
    return not (vllm_config.model_config.is_hybrid and vllm_config.use_v2_model_runner)


def refuse_method(method: Method, vllm_config: VllmConfig) -> None:
    """Refuse a method that the model or the kernel cannot serve.

    Raises:
        PolicyError: naming what is lacking.

    """
    retention, model_config = method.retention, vllm_config.model_config
    if not method.is_plain and not takes_methods(vllm_config):
        raise PolicyError(
            f"{method} needs to know which request is in which row of a batch, and vLLM's V2 model "
            f"runner does not say so for models with layers of constant state such as "
            f"{model_config.model}; set VLLM_USE_V2_MODEL_RUNNER=0"
        )
    if retention is not None and (retention.UNROTATES or retention.rotates):
        refuse_rotary(model_config.hf_text_config)
    cap = getattr(model_config.hf_text_config, "attn_logit_softcapping", None)
    if retention is not None and retention.UNROTATES and cap:
        raise PolicyError(
            f"{retention.name} takes exponentials of scores without bounds, and "
            f"{model_config.model} has a logit soft cap of {cap}"
        )


def why_no_policy(vllm_config: VllmConfig) -> str:
    """Of an engine without one: what to do about it."""
    model = vllm_config.model_config
    if model.is_attention_free:
        return f"{model.model} has no attention: its cache does not grow, and no policy is for it"
    return "this server runs without a cache policy; start it with kvthrift serve --cache-policy"


def refuse_engine(vllm_config: VllmConfig) -> None:
    """Refuse engine features under which pages would be read or shared in ways not built yet.

    Raises:
        PolicyError: naming the feature and how to go on without it.

    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    dtype = str(model.dtype).removeprefix("torch.")
    reasons = (
        (vllm_config.speculative_config, "speculative decoding; drop --speculative-config"),
        (vllm_config.kv_transfer_config, "a KV connector; drop --kv-transfer-config"),
        (model.use_mla, f"multi-head latent attention (MLA), which {model.model} uses"),
        (
            model.is_attention_free,
            f"attention-free models such as {model.model}, whose cache does not grow; drop the "
            "policy",
        ),
        (
            _needs_bfloat16(vllm_config),
            f"{model.dtype} in {model.model}, whose gated delta net layers vLLM has for CPUs in "
            "bfloat16 only; give --dtype bfloat16",
        ),
        (
            _windows_alone(vllm_config),
            f"sliding windows in all layers, as {model.model} has them: its cache does not grow; "
            "drop the policy, or give --disable-sliding-window",
        ),
        (model.is_diffusion, f"diffusion models such as {model.model}"),
        (model.is_encoder_decoder, f"encoder-decoder models such as {model.model}"),
        (model.runner_type != "generate", f"the {model.runner_type!r} runner: only generation"),
        (
            _other_scheduler(vllm_config.scheduler_config.scheduler_cls),
            "a scheduler of your own; drop --scheduler-cls",
        ),
        (_context_parallel(parallel), "context parallelism; drop the context-parallel flags"),
        (
            vllm_config.cache_config.cache_dtype not in {"auto", dtype},
            f"--kv-cache-dtype {vllm_config.cache_config.cache_dtype}: the policy decides how "
            "tokens are stored; drop it, or where the checkpoint asks for it give the model's "
            "type, --dtype bfloat16 --kv-cache-dtype bfloat16",
        ),
        (
            vllm_config.use_v2_model_runner and parallel.pipeline_parallel_size > 1,
            "pipeline parallelism on vLLM's V2 model runner, whose first stages never learn a "
            "request's method; set VLLM_USE_V2_MODEL_RUNNER=0",
        ),
        (
            _eager_stages(vllm_config),
            "pipeline parallelism and --enforce-eager on a CPU, where vLLM then makes no room for "
            "what a stage hands on; drop --enforce-eager",
        ),
        (parallel.use_ubatching, "micro-batches; drop --enable-dbo and --ubatch-size"),
    )
    for present, feature in reasons:
        if present:
            raise PolicyError(f"a cache policy cannot be combined with {feature}")


def _windows_alone(vllm_config: VllmConfig) -> bool:
    """On a GPU V1's workers learn that no layer is ours only with a request, see ``kinds``."""
    told_late = not (current_platform.is_cpu() or vllm_config.use_v2_model_runner)
    return told_late and vllm_config.cache_config.sliding_window is not None


def _needs_bfloat16(vllm_config: VllmConfig) -> bool:
    model = vllm_config.model_config
    delta_net = getattr(model.hf_text_config, "linear_num_key_heads", None) is not None
    return bool(delta_net and model.dtype != torch.bfloat16 and current_platform.is_cpu())


def _eager_stages(vllm_config: VllmConfig) -> bool:
    """A CPU's V1 runner makes a stage's tensors as it warms up, and an eager one does not."""
    eager = vllm_config.compilation_config.mode == CompilationMode.NONE
    stages = vllm_config.parallel_config.pipeline_parallel_size > 1
    return bool(eager and stages and current_platform.is_cpu())


def _other_scheduler(chosen: Any) -> bool:
    return chosen not in {None, SCHEDULER, ASYNC_SCHEDULER}


def _context_parallel(parallel: Any) -> bool:
    decode: int = parallel.decode_context_parallel_size
    prefill: int = parallel.prefill_context_parallel_size
    return decode > 1 or prefill > 1
