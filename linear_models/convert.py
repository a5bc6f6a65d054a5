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

ATTENTION = "blocks.0.att."
NORMS = tuple(
    f"{name}.{part}" for name in ("ln1", "ln2", "att.ln_x") for part in ("weight", "bias")
)
MATRICES = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")
BLOCK = (*NORMS, *(f"{name}.weight" for name in MATRICES))
BLOCK_OF = {
    "rwkv5": (
        "att.gate.weight", "ffn.receptance.weight", "att.time_decay", "att.time_faaaa",
        *(f"att.time_mix_{name}" for name in "kvrg"), *(f"ffn.time_mix_{name}" for name in "kr"),
    ),
    "rwkv7": (
        *(f"att.{name}{number}" for name in "wa" for number in range(3)), "att.g1", "att.g2",
        *(f"att.x_{name}" for name in "rwkvag"), "att.k_k", "att.k_a", "att.r_k", "ffn.x_k",
    ),
}  # fmt: skip
WHOLE = ("emb.weight", "head.weight", "ln_out.weight", "ln_out.bias",
         "blocks.0.ln0.weight", "blocks.0.ln0.bias")  # fmt: skip
_NONE = "and so is no RWKV file of its author's"


def convert(file: Path, folder: Path) -> Path:
    """Write the folder, which must not hold a model yet.

    Args:
        file: weights by name, of RWKV-5.2 or RWKV-7.
        folder: is made.

    Returns:
        The folder.

    Raises:
        PolicyError: the file is none, or of another version; the folder holds a model, or cannot
            be written.

    """
    present = [*folder.glob("config.json"), *folder.glob("*.safetensors")]
    if present:
        raise PolicyError(f"{folder} holds a model already: {present[0].name}")
    weights = _read(file)
    config = config_of(weights)
    try:
        _write(weights, config, folder)
    except OSError as error:
        raise PolicyError(f"{folder} cannot be written: {error}") from error
    return folder


def _write(weights: Weights, config: dict[str, Any], folder: Path) -> None:
    """Give files their names when they are whole, the configuration last."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    parts = {name: folder / f".{name}.part" for name in ("model.safetensors", "config.json")}
    try:
        save_file(_apart(weights), parts["model.safetensors"], metadata={"format": "pt"})
        parts["config.json"].write_text(json.dumps(config, indent=2) + "\n")
        for name, part in parts.items():
            part.replace(folder / name)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def _apart(weights: Weights) -> dict[str, torch.Tensor]:
    """Weights in rows, each in memory of its own, as safetensors wants them."""
    found: dict[str, torch.Tensor] = {}
    places: set[int] = set()
    for name, weight in weights.items():
        place = weight.untyped_storage().data_ptr()
        found[name] = weight.clone() if place in places else weight
        found[name] = found[name].contiguous()
        places.add(place)
    return found


def _read(file: Path) -> Weights:
    """Weights by name, not yet in memory. Nothing of the file is run."""
    try:
        found = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise PolicyError(f"{file} cannot be read as weights: {error}") from error
    if not isinstance(found, dict) or "emb.weight" not in found:
        raise PolicyError(f"{file} has no emb.weight, {_NONE}")
    for name, weight in found.items():
        if not isinstance(name, str) or not isinstance(weight, torch.Tensor):
            raise PolicyError(f"{file} has an entry {name!r} that is no weight, {_NONE}")
    return found


def config_of(weights: Weights) -> dict[str, Any]:
    """The configuration that the shapes of the weights say.

    Raises:
        PolicyError: a version that no model here is for, or a weight that is missing.

    """
    common = {
        "vocab_size": _size(weights, "emb.weight", 0),
        "hidden_size": _size(weights, "emb.weight", 1),
        "num_hidden_layers": _blocks(weights),
        "intermediate_size": _size(weights, "blocks.0.ffn.key.weight", 0),
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": str(weights["emb.weight"].dtype).removeprefix("torch."),
    }
    of_version = {"7": _rwkv7, "5.2": _rwkv5}
    version = _version(weights)
    if version not in of_version:
        raise PolicyError(f"the file is of RWKV-{version}; known here are RWKV-5.2 and RWKV-7")
    config: dict[str, Any] = common | of_version[version](weights)
    for name in _names(config["model_type"], config["num_hidden_layers"]):
        _size(weights, name, 0)
    return config


def _version(weights: Weights) -> str:
    """Of the model, by what its first block has."""
    if f"{ATTENTION}r_k" in weights:
        return "7"
    if f"{ATTENTION}time_maa_x" in weights:
        return "6"
    decay = weights.get(f"{ATTENTION}time_decay")
    if decay is None:
        raise PolicyError(f"the file has no {ATTENTION}time_decay, {_NONE}")
    if f"{ATTENTION}time_first" in weights and f"{ATTENTION}ln_x.weight" not in weights:
        return "4"
    return "5.2" if decay.dim() > 1 and decay.shape[1] > 1 else "5.0 or 5.1"


def _names(model_type: str, blocks: int) -> list[str]:
    """Weights that a file of so many blocks must have, beside those from which sizes follow."""
    of_block = (*BLOCK, *BLOCK_OF[model_type])
    later = [f"att.v{number}" for number in range(3)] if model_type == "rwkv7" else []
    return [
        *WHOLE,
        *(f"blocks.{b}.{name}" for b in range(blocks) for name in of_block),
        *(f"blocks.{b}.{name}" for b in range(1, blocks) for name in later),
    ]


def _blocks(weights: Weights) -> int:
    """How many there are, of which none may be missing."""
    found = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    for number in range(len(found)):
        if str(number) not in found:
            raise PolicyError(f"the file has no blocks.{number}, {_NONE}")
    return len(found)


def _size(weights: Weights, name: str, dim: int) -> int:
    """Of a weight that must be there, in one of its dimensions."""
    if name not in weights:
        raise PolicyError(f"the file has no {name}, {_NONE}")
    if weights[name].dim() <= dim:
        raise PolicyError(f"the file has {name} of shape {[*weights[name].shape]}, {_NONE}")
    return weights[name].shape[dim]


def _rwkv5(weights: Weights) -> dict[str, Any]:
    heads, size = weights[f"{ATTENTION}time_decay"].shape[:2]
    return {
        "architectures": ["Rwkv5ForCausalLM"],
        "model_type": "rwkv5",
        "head_size": size,
        "attention_hidden_size": heads * size,
    }


def _rwkv7(weights: Weights) -> dict[str, Any]:
    if "blocks.0.ffn.s_emb.weight" in weights:
        raise PolicyError("RWKV-7 with embeddings of the channel mix (DeepEmbed) is not known here")
    values = "blocks.1.att.v1"  # which the first block has none of
    return {
        "architectures": ["RWKV7ForCausalLM"],
        "model_type": "rwkv7",
        "head_dim": _size(weights, f"{ATTENTION}r_k", 1),
        "decay_low_rank_dim": _size(weights, f"{ATTENTION}w1", 1),
        "a_low_rank_dim": _size(weights, f"{ATTENTION}a1", 1),
        "v_low_rank_dim": _size(weights, values, 1) if _blocks(weights) > 1 else 1,
        "gate_low_rank_dim": _size(weights, f"{ATTENTION}g1", 1),
    }
