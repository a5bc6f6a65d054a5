"""The author's RWKV files (``.pth``) as folders that vLLM reads: ``config.json`` and safetensors.

Names and items stay the author's, which the models here know. Sizes follow from the weights.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from cache_policies.errors import PolicyError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    Weights = Mapping[str, torch.Tensor]


def convert(file: Path, folder: Path) -> Path:
    """Write the folder, which must not hold a model yet.

    Args:
        file: weights by name, of RWKV-5.2 or RWKV-7.
        folder: is made.

    Returns:
        The folder.

    Raises:
        PolicyError: the file is none, or of another version; the folder holds a model.

    """
    from safetensors.torch import save_file

    if (folder / "config.json").exists():
        raise PolicyError(f"{folder} holds a model already")
    weights = _read(file)
    config = config_of(weights)
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def _read(file: Path) -> Weights:
    """Weights by name, not yet in memory. Nothing of the file is run."""
    try:
        found = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise PolicyError(f"{file} cannot be read as weights: {error}") from error
    if not isinstance(found, dict) or "emb.weight" not in found:
        raise PolicyError(f"{file} has no emb.weight, and so is no RWKV file of its author's")
    return found


def config_of(weights: Weights) -> dict[str, Any]:
    """The configuration that the shapes of the weights say.

    Raises:
        PolicyError: a version that no model here is for.

    """
    vocabulary, hidden = weights["emb.weight"].shape
    blocks = {int(name.split(".")[1]) for name in weights if name.startswith("blocks.")}
    common = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": len(blocks),
        "intermediate_size": len(weights["blocks.0.ffn.key.weight"]),
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": str(weights["emb.weight"].dtype).removeprefix("torch."),
    }
    first = "blocks.0.att."
    block = {n.removeprefix(first): w for n, w in weights.items() if n.startswith(first)}
    if "r_k" in block:
        return {**common, **_rwkv7(block, weights)}
    decay = block.get("time_decay")
    if "time_maa_x" not in block and decay is not None and decay.dim() > 1 and decay.shape[1] > 1:
        return {**common, **_rwkv5(block)}
    raise PolicyError(
        "neither RWKV-5.2 nor RWKV-7: blocks.0.att has no r_k, no time_decay of heads"
    )


def _rwkv5(block: Weights) -> dict[str, Any]:
    heads, size = block["time_decay"].shape[:2]
    return {
        "architectures": ["Rwkv5ForCausalLM"],
        "model_type": "rwkv5",
        "head_size": size,
        "attention_hidden_size": heads * size,
    }


def _rwkv7(block: Weights, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    if "blocks.0.ffn.s_emb.weight" in weights:
        raise PolicyError("RWKV-7 with embeddings of the channel mix (DeepEmbed) is not known here")
    values = weights.get("blocks.1.att.v1")  # which the first block has none of
    return {
        "architectures": ["RWKV7ForCausalLM"],
        "model_type": "rwkv7",
        "head_dim": block["r_k"].shape[1],
        "decay_low_rank_dim": block["w1"].shape[1],
        "a_low_rank_dim": block["a1"].shape[1],
        "v_low_rank_dim": 1 if values is None else values.shape[1],
        "gate_low_rank_dim": block["g1"].shape[1],
    }
