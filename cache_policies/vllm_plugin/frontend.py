"""What the process that takes requests knows of the engine.

``LogitsProcessor.validate_params``, from which an error becomes an HTTP 400, is given a request's
parameters only. vLLM hands the engine's configuration to the stat loggers of its servers; this
one remembers it and logs nothing. Can go when ``validate_params`` is given the configuration.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.metrics.loggers import StatLoggerBase

from cache_policies.errors import PolicyError
from cache_policies.policy import parse_method
from cache_policies.vllm_plugin.config import POLICY_KEY, refuse_method, settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

_engines: list[VllmConfig] = []  # at most one: the last that this process serves


def note_engine(vllm_config: VllmConfig) -> None:
    """Remember the engine of this process."""
    _engines[:] = [vllm_config]


def check_request(sampling_params: SamplingParams) -> None:
    """Refuse a request's policy, see ``check_method``."""
    asked = (sampling_params.extra_args or {}).get(POLICY_KEY)
    if asked is not None:
        check_method(asked)


def check_method(asked: Any) -> None:
    """Refuse a policy of a request that is not valid, or that this engine cannot serve.

    Raises:
        PolicyError: naming what is allowed.

    """
    for vllm_config in _engines:
        if settings(vllm_config) is None:
            raise PolicyError(
                f"{POLICY_KEY}={asked!r}: this server runs without a cache policy; start it with "
                "kvthrift serve --cache-policy"
            )
    method = parse_method(asked)
    for vllm_config in _engines:
        refuse_method(method, vllm_config.model_config)


class EngineNote(StatLoggerBase):  # type: ignore[misc]
    """Entry point ``vllm.stat_logger_plugins``."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        note_engine(vllm_config)

    def record(self, *_: Any, **__: Any) -> None:
        """Nothing."""

    def log_engine_initialized(self) -> None:
        """Nothing."""
