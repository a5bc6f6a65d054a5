"""Prompt compression: fewer words reach the model. It combines with every cache policy."""

from __future__ import annotations

from server.compression.base import Compressor, CompressorError, Word, keep_words, split_words
from server.compression.llmlingua import LLMLingua2
from server.compression.selective import SelectiveContext

__all__ = [
    "COMPRESSORS",
    "Compressor",
    "CompressorError",
    "LLMLingua2",
    "SelectiveContext",
    "Word",
    "keep_words",
    "split_words",
]

COMPRESSORS = {cls.name: cls for cls in (LLMLingua2, SelectiveContext)}
