"""All retrieval methods by the name a user writes: of decode queries, and of the prompt's."""

from __future__ import annotations

from cache_policies.retrieval.base import Retrieval
from cache_policies.retrieval.infllm import InfLLM
from cache_policies.retrieval.quest import Quest
from cache_policies.retrieval.sparse_prefill import SparsePrefill

RETRIEVAL: dict[str, type[Retrieval]] = {cls.name: cls for cls in (InfLLM, Quest)}

PREFILL: dict[str, type[SparsePrefill]] = {SparsePrefill.name: SparsePrefill}

__all__ = ["PREFILL", "RETRIEVAL", "Retrieval", "SparsePrefill"]
