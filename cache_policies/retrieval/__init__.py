"""All retrieval methods by the name a user writes."""

from __future__ import annotations

from cache_policies.retrieval.base import Retrieval
from cache_policies.retrieval.infllm import InfLLM
from cache_policies.retrieval.quest import Quest

RETRIEVAL: dict[str, type[Retrieval]] = {cls.name: cls for cls in (InfLLM, Quest)}

__all__ = ["RETRIEVAL", "Retrieval"]
