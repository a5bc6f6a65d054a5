from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.scheduling.counting import LAYERS

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration; there are no weights."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=256, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    return folder
