"""What the routes know of the server they run in."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prometheus_client import generate_latest
from vllm.v1.metrics.prometheus import get_prometheus_registry

from cache_policies.errors import PolicyError
from cache_policies.policy import parse_method
from cache_policies.vllm_plugin.config import settings
from server.api.schemas import Shape
from server.compression import Compressor, CompressorError
from server.compression.request import PromptCompression
from server.model_shape import ModelShape

if TYPE_CHECKING:
    from cache_policies.policy import Policy

_ALIAS = re.compile(r"([A-Za-z0-9._/-]+)=(.+)")
MOST_FACTS = 4096  # of requests whose response has not taken them yet


@dataclass
class ServerState:
    """One API process.

    Attributes:
        vllm_config: the engine's; None until it is up.
        names: served model names.
        aliases: further model names, each standing for a method.
        facts: by request id, what ended requests held; taken by their response.
        tokenizer: the served model's; None until the engine is up.
        compressors: of prompts, by name.
        compression: what happens to prompts that do not say.
        stopping: the process was told to stop and only ends what runs.

    """

    vllm_config: Any = None
    names: list[str] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokenizer: Any = None
    compressors: dict[str, Compressor] = field(default_factory=dict)
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
        if how.method not in self.compressors:
            raise CompressorError(
                f"this server has no compressor {how.method!r} (kvthrift serve "
                f"--prompt-compressor MODEL); it has: {', '.join(self.compressors)}"
            )
        return how, self.compressors[how.method]

    @property
    def model(self) -> str:
        """The first served name."""
        return self.names[0] if self.names else ""

    @property
    def policy(self) -> Policy | None:
        """The engine's policy."""
        found = settings(self.vllm_config) if self.vllm_config else None
        return found.policy if found else None

    @property
    def shape(self) -> Shape:
        """The served model's."""
        model = self.vllm_config.model_config
        found = ModelShape.of(model.hf_text_config, model.dtype)
        return Shape(
            layers=found.layers,
            num_kv_heads=model.get_total_num_kv_heads(),
            head_size=model.get_head_size(),
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
            return "this server runs without a cache policy"
        return (
            "the engine has not reported yet; under vLLM's own command, set "
            "PROMETHEUS_MULTIPROC_DIR to an empty folder before the start"
        )

    def note(self, request_id: str, facts: dict[str, Any]) -> None:
        """Keep what an ended request held, for its response to take."""
        while len(self.facts) >= MOST_FACTS:
            self.facts.pop(next(iter(self.facts)))
        self.facts[request_id] = facts

    def take(self, response_id: str) -> list[dict[str, Any]]:
        """Facts of a response: of its request, or of each of its prompts."""
        if response_id in self.facts:
            return [self.facts.pop(response_id)]
        # clients may choose ids: of job-2's request nothing belongs to job
        mine = re.compile(rf"{re.escape(response_id)}-\d+")
        return [self.facts.pop(k) for k in list(self.facts) if mine.fullmatch(k)]

    def resolve(self, name: str) -> tuple[str, str] | None:
        """Model and method of a name like ``NAME@METHOD`` or an alias; None: a plain name."""
        if name in self.names:
            return None
        if name in self.aliases:
            return self.model, self.aliases[name]
        model, at, method = name.partition("@")
        return (model, method) if at and model in self.names else None


def parse_aliases(texts: list[str], names: list[str]) -> dict[str, str]:
    """Read ``fast=snapkv(budget=512)``.

    Raises:
        PolicyError: bad spelling, a name that is taken, or a bad method.

    """
    found: dict[str, str] = {}
    for text in texts:
        match = _ALIAS.fullmatch(text)
        if not match:
            raise PolicyError(f"--policy-alias {text!r} is not NAME=METHOD")
        if match[1] in names or match[1] in found:
            raise PolicyError(f"--policy-alias {text!r}: {match[1]!r} is a model name already")
        found[match[1]] = str(parse_method(match[2]))
    return found
