"""What the routes know of the server they run in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prometheus_client import generate_latest
from vllm.v1.metrics.prometheus import get_prometheus_registry

from cache_policies.vllm_plugin.config import settings, why_no_policy
from server.api.names import ModelNames
from server.api.schemas import Shape
from server.compression import Compressor, CompressorError
from server.compression.request import PromptCompression
from server.model_shape import ModelShape

if TYPE_CHECKING:
    from cache_policies.policy import Policy


@dataclass
class ServerState:
    """One API process.

    Attributes:
        vllm_config: the engine's; None until it is up.
        names: of models, that requests may use.
        tokenizer: the served model's; None until the engine is up.
        compressors: of prompts, by name.
        why_no_compressor: why there is none.
        compression: what happens to prompts that do not say.
        stopping: the process was told to stop and only ends what runs.

    """

    vllm_config: Any = None
    names: ModelNames = field(default_factory=ModelNames)
    tokenizer: Any = None
    compressors: dict[str, Compressor] = field(default_factory=dict)
    why_no_compressor: str | None = None
    compression: PromptCompression | None = None
    stopping: bool = False

    async def compressor(self, wanted: object) -> tuple[PromptCompression, Compressor] | None:
        """How a request's prompt is compressed, and what does it; None: not at all.

        Raises:
            CompressorError: a bad wish, or one this server cannot fulfil.

        """
        how = self.compression if wanted is None else PromptCompression.of(wanted)
        if how is None or how.method == "none":
            return None
        if self.why_no_compressor is not None:
            raise CompressorError(f"prompts cannot be compressed here: {self.why_no_compressor}")
        if how.method not in self.compressors:
            raise CompressorError(
                f"this server has no compressor {how.method!r} (kvthrift serve "
                f"--prompt-compressor MODEL); it has: {', '.join(self.compressors)}"
            )
        return how, self.compressors[how.method]

    @property
    def policy(self) -> Policy | None:
        """The engine's policy."""
        found = settings(self.vllm_config) if self.vllm_config else None
        return found.policy if found else None

    @property
    def shape(self) -> Shape:
        """The served model's."""
        model = self.vllm_config.model_config
        states = self.vllm_config.cache_config.mamba_ssm_cache_dtype
        found = ModelShape.of(model.hf_text_config, model.dtype, states)
        return Shape(
            layers=found.layers,
            num_kv_heads=model.get_total_num_kv_heads() if found.layers else 0,
            head_size=model.get_head_size() if found.layers else 0,
            dtype=str(model.dtype).removeprefix("torch."),  # type: ignore[arg-type]
            constant_bytes=found.constant_bytes,
        )

    def metrics_text(self) -> str:
        """All metrics of all processes of this server."""
        return generate_latest(get_prometheus_registry()).decode()

    @property
    def why_no_stats(self) -> str:
        """Why the engine shows no metrics."""
        if self.policy is None:
            return why_no_policy(self.vllm_config)
        return (
            "the engine has not reported yet; under vLLM's own command, set "
            "PROMETHEUS_MULTIPROC_DIR to an empty folder before the start"
        )
