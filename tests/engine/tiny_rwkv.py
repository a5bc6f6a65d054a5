"""A tiny RWKV-5 with random weights, and what the author's package ``rwkv`` answers."""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

HIDDEN, HEADS, SIZE, LAYERS, VOCABULARY = 128, 2, 64, 2, 512
AUTHORS = "author.pth"  # the same weights under the names of the author's files
# as RWKV/rwkv-5-world-1b5 has it, but for the sizes; a head's size stands for the number of heads
RWKV5: dict[str, Any] = {
    "architectures": ["Rwkv5ForCausalLM"], "model_type": "rwkv5", "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN, "attention_hidden_size": HIDDEN, "num_hidden_layers": LAYERS,
    "num_attention_heads": SIZE, "head_size": SIZE, "intermediate_size": None,
    "layer_norm_epsilon": 1e-5, "rescale_every": 6, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 0, "use_cache": True,
    "auto_map": {"AutoConfig": "configuration_rwkv5.Rwkv5Config"},
}  # fmt: skip
RENAMED = {
    "emb.": "rwkv.embeddings.", "blocks.": "rwkv.blocks.", "ln_out.": "rwkv.ln_out.",
    ".att.": ".attention.", ".ffn.": ".feed_forward.", ".ln0.": ".pre_ln.",
}  # fmt: skip
MIXES = ("key", "value", "receptance", "gate")


def make_rwkv5(folder: Path) -> str:
    """Save a model with the names of the hub's checkpoints; beside it a file of the author's."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    weights = rwkv5_weights()
    torch.save(weights, folder / AUTHORS)
    (folder / "config.json").write_text(json.dumps(RWKV5))
    named = {_published(name): w for name, w in weights.items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def rwkv5_weights() -> dict[str, torch.Tensor]:
    """Random weights whose next tokens are not all alike; decays of all speeds."""
    inner = HIDDEN * 7 // 2 // 32 * 32
    sizes = {"emb": (VOCABULARY, HIDDEN), "head": (VOCABULARY, HIDDEN)}
    weights = {"ln_out.weight": torch.ones(HIDDEN), "ln_out.bias": torch.zeros(HIDDEN)}
    for i in range(LAYERS):
        block, att, ffn = f"blocks.{i}.", f"blocks.{i}.att.", f"blocks.{i}.ffn."
        norms = [f"{block}ln1", f"{block}ln2", f"{att}ln_x", *(["blocks.0.ln0"] if not i else [])]
        for name in norms:
            weights[f"{name}.weight"] = 1 + torch.randn(HIDDEN) * 0.1
            weights[f"{name}.bias"] = torch.randn(HIDDEN) * 0.1
        for name in (*(f"{att}time_mix_{m[0]}" for m in MIXES), f"{ffn}time_mix_k"):
            weights[name] = torch.rand(1, 1, HIDDEN)
        weights[f"{ffn}time_mix_r"] = torch.rand(1, 1, HIDDEN)
        weights[f"{att}time_decay"] = torch.randn(HEADS, SIZE) * (i + 1)
        weights[f"{att}time_faaaa"] = torch.randn(HEADS, SIZE) * 0.1
        sizes |= {f"{att}{name}": (HIDDEN, HIDDEN) for name in (*MIXES, "output")}
        sizes |= {f"{ffn}key": (inner, HIDDEN), f"{ffn}value": (HIDDEN, inner)}
        sizes[f"{ffn}receptance"] = (HIDDEN, HIDDEN)
    return weights | {f"{name}.weight": torch.randn(size) * 0.1 for name, size in sizes.items()}


def _published(name: str) -> str:
    for theirs, ours in RENAMED.items():
        if name.startswith(theirs) or theirs[0] == ".":
            name = name.replace(theirs, ours, 1)
    for mix in MIXES:
        if name.endswith(f".time_mix_{mix[0]}"):
            name = name.removesuffix(mix[0]) + mix
    return name


@functools.cache
def authors_model(folder: str) -> Any:
    """The package's model of a folder's weights, in float32.

    Its import asks the environment for one of two implementations: RWKV-7's, or that of others.
    """
    goose = "rwkv7" in (Path(folder) / "config.json").read_text()
    os.environ |= {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": str(int(goose))}
    sys.modules.pop("rwkv.model", None)
    rwkv, file = importlib.import_module("rwkv.model"), Path(folder) / AUTHORS
    if goose:
        return rwkv.RWKV(model=str(file.with_suffix("")), strategy="cpu fp32")
    return rwkv.RWKV(model=str(file), strategy="cpu fp32", verbose=False)


def logprobs_rwkv(
    folder: str, prompt: list[int], answer: list[int]
) -> tuple[list[float], list[int]]:
    """Of each token of an answer after those before it; and the package's likeliest tokens."""
    logits, _ = authors_model(folder).forward(prompt + answer, None, full_output=True)
    found = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return [float(row[t]) for row, t in zip(found, answer, strict=True)], found.argmax(-1).tolist()


def agree_rwkv(folder: str, prompts: list[list[int]], answers: list[list[int]]) -> list[int]:
    """How many tokens of each answer are those that the package chooses."""
    return [
        sum(a == b for a, b in zip(logprobs_rwkv(folder, prompt, answer)[1], answer, strict=True))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
