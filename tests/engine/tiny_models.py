"""Tiny models of many families with random weights, and what transformers answers with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pathlib import Path

IDS = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {
    **IDS, "hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 64,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64,
    "max_position_embeddings": 65536,
}  # fmt: skip
MAMBA2 = {"mamba_n_groups": 1, "mamba_d_state": 16, "mamba_d_head": 32, "mamba_chunk_size": 64}
LINEAR = {
    **IDS, "hidden_size": 64, "num_hidden_layers": 3, "expand": 2, "tie_word_embeddings": False,
}  # fmt: skip
# class of the configuration, and its arguments
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("Gemma2Config", {
        **SMALL, "sliding_window": 256, "query_pre_attn_scalar": 64, "attn_logit_softcapping": 5.0,
    }),
    "gemma3": ("Gemma3TextConfig", {
        **SMALL, "sliding_window": 256, "query_pre_attn_scalar": 64,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 6,
    }),
    "gpt-oss": ("GptOssConfig", {
        **SMALL, "num_attention_heads": 8, "num_key_value_heads": 2, "sliding_window": 128,
        "num_local_experts": 4, "num_experts_per_tok": 2,
    }),
    "llama4": ("Llama4TextConfig", {
        **SMALL, "attention_chunk_size": 256, "num_local_experts": 2, "num_experts_per_tok": 1,
        "intermediate_size_mlp": 64, "moe_layers": [], "attn_temperature_tuning": False,
        "no_rope_layers": [1, 1, 1, 0], "use_qk_norm": False, "interleave_moe_layer_step": 0,
    }),
    "granite4": ("GraniteMoeHybridConfig", {
        **SMALL, **MAMBA2, "hidden_size": 128, "shared_intermediate_size": 64, "mamba_n_heads": 8,
        "num_local_experts": 0, "num_experts_per_tok": 0, "mamba_expand": 2,
        "layer_types": ["mamba", "attention", "mamba", "attention"],
        "position_embedding_type": "nope",
    }),
    "falcon-h1": ("FalconH1Config", {
        **SMALL, **MAMBA2, "num_hidden_layers": 2, "mamba_d_ssm": 128, "mamba_n_heads": 4,
    }),
    "nemotron-h": ("NemotronHConfig", {
        **SMALL, "hybrid_override_pattern": "M*M-", "mamba_num_heads": 4, "mamba_head_dim": 32,
        "ssm_state_size": 16, "n_groups": 1, "chunk_size": 64,
    }),
    "qwen3-next": ("Qwen3NextConfig", {
        **SMALL, "num_attention_heads": 4, "num_key_value_heads": 2, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 4,
        "num_experts_per_tok": 2,
    }),
    "jamba": ("JambaConfig", {
        **SMALL, "hidden_size": 128, "attn_layer_period": 2, "attn_layer_offset": 1,
        "num_experts": 2, "num_experts_per_tok": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "mamba_d_state": 16, "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    }),
    "mamba": ("MambaConfig", {**LINEAR, "state_size": 16, "time_step_rank": 4}),
    "falcon-mamba": ("FalconMambaConfig", {**LINEAR, "state_size": 16, "time_step_rank": 4}),
    "mamba2": ("Mamba2Config", {
        **LINEAR, "state_size": 16, "num_heads": 4, "head_dim": 32, "n_groups": 1, "chunk_size": 64,
    }),
    "recurrent-gemma": ("RecurrentGemmaConfig", {
        **SMALL, "num_hidden_layers": 5, "intermediate_size": 128, "num_attention_heads": 2,
        "hidden_size": 128, "attention_window_size": 256,
    }),
    # state-spaces/mamba-2.8b-hf with one layer of 64
    "mamba-2.8b": ("MambaConfig", {
        "hidden_size": 2560, "num_hidden_layers": 1, "vocab_size": 50280, "state_size": 16,
        "pad_vocab_size_multiple": 8, "time_step_rank": 160, "residual_in_fp32": True,
        "tie_word_embeddings": True,
    }),
}  # fmt: skip


def make_model(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> str:
    """Save a model of the family, whose next tokens are not all alike."""
    import transformers
    from tokenizers import Tokenizer, models

    name, arguments = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**arguments)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() >= 2 and "A_log" not in key and "conv" not in key:
                # scaled embeddings would outweigh what RecurrentGemma's layers add to them
                strong = family == "recurrent-gemma" and "embed" not in key
                weight.normal_(0, 0.25 if strong else 0.08)
            if "sinks" in key:
                weight.normal_(0, 1)
    model.generation_config = transformers.GenerationConfig()
    model.to(dtype).save_pretrained(folder)
    vocabulary = {chr(300 + i): i for i in range(IDS["vocab_size"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return str(folder)


def logprobs(folder: str, prompt: list[int], answer: list[int]) -> tuple[list[float], list[int]]:
    """Of each token of an answer after those before it, in float32; and the likeliest tokens."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer]), use_cache=False).logits[0]
    found = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return [float(row[t]) for row, t in zip(found, answer, strict=True)], found.argmax(-1).tolist()


def agree(folder: str, prompts: list[list[int]], answers: list[list[int]]) -> list[int]:
    """How many tokens of each answer are those that transformers chooses.

    A token is compared after the answer's tokens before it: all are the same where all agree.
    """
    return [
        sum(a == b for a, b in zip(logprobs(folder, prompt, answer)[1], answer, strict=True))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
