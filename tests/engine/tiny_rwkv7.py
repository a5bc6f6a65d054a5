"""A tiny RWKV-7 with random weights, under the names of the author's files and of the hub's."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import torch

from tests.engine.tiny_rwkv import AUTHORS, HEADS, HIDDEN, LAYERS, SIZE, VOCABULARY

if TYPE_CHECKING:
    from pathlib import Path

RANKS = {"w": 32, "a": 24, "v": 16, "g": 40}
# as RWKV/RWKV7-Goose-World3-1.5B-HF has it, but for the sizes
RWKV7: dict[str, Any] = {
    "architectures": ["RWKV7ForCausalLM"], "model_type": "rwkv7", "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "head_dim": SIZE, "hidden_ratio": 4.0,
    "intermediate_size": 4 * HIDDEN, "decay_low_rank_dim": RANKS["w"],
    "a_low_rank_dim": RANKS["a"], "v_low_rank_dim": RANKS["v"], "gate_low_rank_dim": RANKS["g"],
    "norm_eps": 1e-5, "norm_bias": True, "norm_first": True, "hidden_act": "sqrelu",
    "attn": None, "attn_mode": "chunk", "fuse_norm": False, "use_cache": True,
    "max_position_embeddings": 2048, "tie_word_embeddings": False, "bos_token_id": 1,
    "eos_token_id": 2, "auto_map": {"AutoConfig": "modeling_rwkv7.RWKV7Config"},
}  # fmt: skip
HUBS = {
    "emb.": "model.embeddings.", "head.": "lm_head.", "ln_out.": "model.norm.",
    "blocks.": "model.layers.", ".att.receptance.": ".attn.r_proj.", ".att.key.": ".attn.k_proj.",
    ".att.value.": ".attn.v_proj.", ".att.output.": ".attn.o_proj.", ".att.ln_x.": ".attn.g_norm.",
    ".att.": ".attn.", ".ln0.": ".pre_norm.", ".ln1.": ".attn_norm.", ".ln2.": ".ffn_norm.",
}  # fmt: skip
LOW_RANK = {"0": "2.bias", "1": "0.weight", "2": "2.weight"}


def make_rwkv7(folder: Path, names: str = "hub") -> str:
    """Save a model with the names of the checkpoints on the ``hub``, or of ``old`` ones there."""
    from safetensors.torch import save_file

    weights = rwkv7_weights()
    torch.save(weights, folder / AUTHORS)
    (folder / "config.json").write_text(json.dumps(RWKV7))
    save_file(_published(weights, stacked=names == "old"), folder / "model.safetensors")
    return str(folder)


def rwkv7_weights() -> dict[str, torch.Tensor]:
    """Random weights under the author's names; decays, rates and gates of all sizes."""
    torch.manual_seed(0)
    weights = {"ln_out.weight": torch.ones(HIDDEN), "ln_out.bias": torch.zeros(HIDDEN)}
    sizes = {"emb": (VOCABULARY, HIDDEN), "head": (VOCABULARY, HIDDEN)}
    for i in range(LAYERS):
        block, att, ffn = f"blocks.{i}.", f"blocks.{i}.att.", f"blocks.{i}.ffn."
        norms = [f"{block}ln1", f"{block}ln2", f"{att}ln_x", *(["blocks.0.ln0"] if not i else [])]
        for name in norms:
            weights[f"{name}.weight"] = 1 + torch.randn(HIDDEN) * 0.1
            weights[f"{name}.bias"] = torch.randn(HIDDEN) * 0.1
        for name in (*(f"{att}x_{m}" for m in "rwkvag"), f"{ffn}x_k"):
            weights[name] = torch.rand(1, 1, HIDDEN)
        for name, rank in RANKS.items():  # the first block's v is in the files, and not used
            weights[f"{att}{name}1"] = torch.randn(HIDDEN, rank) * 0.2
            weights[f"{att}{name}2"] = torch.randn(rank, HIDDEN) * 0.2
            if name != "g":
                weights[f"{att}{name}0"] = torch.randn(1, 1, HIDDEN)
        weights[f"{att}k_k"] = 0.7 + torch.randn(1, 1, HIDDEN) * 0.1
        weights[f"{att}k_a"] = 1 + torch.randn(1, 1, HIDDEN) * 0.1
        weights[f"{att}r_k"] = torch.randn(HEADS, SIZE) * 0.1
        sizes |= {f"{att}{n}": (HIDDEN, HIDDEN) for n in ("receptance", "key", "value", "output")}
        sizes |= {f"{ffn}key": (4 * HIDDEN, HIDDEN), f"{ffn}value": (HIDDEN, 4 * HIDDEN)}
    return weights | {f"{name}.weight": torch.randn(size) * 0.1 for name, size in sizes.items()}


def _published(weights: dict[str, torch.Tensor], *, stacked: bool) -> dict[str, torch.Tensor]:
    found = {}
    for name, weight in weights.items():
        if re.match(r"blocks\.0\.att\.v\d", name):
            continue
        low_rank = re.search(r"att\.([wavg])([012])$", name)
        for theirs, hubs in HUBS.items():
            if name.startswith(theirs) or theirs[0] == ".":
                name = name.replace(theirs, hubs, 1)  # noqa: PLW2901
        if low_rank:
            kind, place = low_rank.groups()
            name = f"{name[:-2]}{kind}_lora.lora.{LOW_RANK[place]}"  # noqa: PLW2901
            weight = weight.flatten() if place == "0" else weight.T.contiguous()  # noqa: PLW2901
        if weight.dim() == 3 and ".attn.x_" not in name:
            weight = weight.flatten()  # noqa: PLW2901
        found[name] = weight
    for i in range(LAYERS if stacked else 0):
        att = f"model.layers.{i}.attn."
        found[f"{att}x_x"] = torch.stack([found.pop(f"{att}x_{m}").flatten() for m in "rwkvag"])
    return found
