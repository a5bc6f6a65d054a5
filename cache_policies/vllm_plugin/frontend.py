"""What the process that takes requests knows of the engine.

``LogitsProcessor.validate_params``, from which an error becomes an HTTP 400, is given a request's
parameters only. vLLM hands the engine's configuration to the stat loggers of its servers; this
one remembers it and logs nothing. Can go when ``validate_params`` is given the configuration.
"""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Any

from vllm.v1.metrics.loggers import StatLoggerBase

from cache_policies.errors import PolicyError
from cache_policies.policy import parse_method
from cache_policies.spelling import refuse_near
from cache_policies.vllm_plugin.config import (
    KERNEL_KEY,
    POLICY_KEY,
    PROMPT_KEY,
    ROOM_KEY,
    refuse_method,
    settings,
    why_no_policy,
)
from cache_policies.vllm_plugin.mailbox import SLOT_KEY

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

    from cache_policies.policy import Method

_engines: list[VllmConfig] = []  # at most one: the last that this process serves


def note_engine(vllm_config: VllmConfig) -> None:
    """Remember the engine of this process."""
    _engines[:] = [vllm_config]


def check_request(sampling_params: SamplingParams) -> None:
    """Refuse a request's policy, see ``check_keys`` and ``check_method``."""
    extra = sampling_params.extra_args or {}
    check_keys(extra)
    if extra.get(POLICY_KEY) is not None:
        check_method(extra[POLICY_KEY])


def check_keys(extra: dict[str, Any]) -> None:
    """Refuse keys of ``vllm_xargs`` that are not a request's, or almost one of ours.

    Raises:
        PolicyError: naming the right key.

    """
    refuse_near(extra, (POLICY_KEY, KERNEL_KEY), "vllm_xargs")
    if KERNEL_KEY in extra:
        raise PolicyError(f"{KERNEL_KEY} is the server's: kvthrift serve --cache-kernel")
    for key in (PROMPT_KEY, ROOM_KEY, SLOT_KEY):
        if key in extra:
            raise PolicyError(f"{key} is the scheduler's, for the workers; leave it out")


def check_method(asked: Any) -> Method:
    """What a request chose.

    Raises:
        PolicyError: it is not valid, or this engine cannot serve it; naming what is allowed.

    """
    for vllm_config in _engines:
        if settings(vllm_config) is None:
            shown = reprlib.repr(asked)
            raise PolicyError(f"{POLICY_KEY}={shown}: {why_no_policy(vllm_config)}")
    method = parse_method(asked)
    for vllm_config in _engines:
        refuse_method(method, vllm_config)
    return method


class EngineNote(StatLoggerBase):  # type: ignore[misc]
    """Entry point ``vllm.stat_logger_plugins``."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        note_engine(vllm_config)

    def record(self, *_: Any, **__: Any) -> None:
        """Nothing."""

    def log_engine_initialized(self) -> None:
        """Nothing."""
