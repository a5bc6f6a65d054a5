"""Engines that must not start, and what they say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from linear_models.configs import register_configs
from tests.engine.tiny_models import FAMILIES

if TYPE_CHECKING:
    from tests.engine.conftest import Program

SMALL = {
    "vocab_size": 256, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
}  # fmt: skip
MLA = {
    "kv_lora_rank": 64, "q_lora_rank": None, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64,
    "v_head_dim": 64, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 2,
    "moe_intermediate_size": 64, "num_key_value_heads": 4,
}  # fmt: skip
AUDIO = {
    "vocab_size": 256, "d_model": 128, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
    "decoder_start_token_id": 0,
}  # fmt: skip
MAMBA2 = {
    "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16, "num_heads": 4,
    "head_dim": 32, "n_groups": 1, "expand": 2, "chunk_size": 64,
}  # fmt: skip
SHARED = {
    **SMALL, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4,
    "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 64,
    "laurel_rank": 8, "sliding_window": 256, "activation_sparsity_pattern": [0.0] * 4,
    "intermediate_size": [256] * 4,
}  # fmt: skip
BLOOM = {"vocab_size": 256, "hidden_size": 256, "n_layer": 2, "n_head": 4}
# model type -> class and configuration, without weights: they are refused before these are read
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2": ("DeepseekV2ForCausalLM", {**SMALL, **MLA}),
    "whisper": ("WhisperForConditionalGeneration", AUDIO),
    "bloom": ("BloomForCausalLM", BLOOM),
    "gemma2": ("Gemma2ForCausalLM", FAMILIES["gemma2"][1]),
    "gemma3n_text": ("Gemma3nForCausalLM", SHARED),
    "mamba2": ("Mamba2ForCausalLM", MAMBA2),
    "rwkv5": ("Rwkv5ForCausalLM", {"vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 2}),
    "rwkv7": ("RWKV7ForCausalLM", {"vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 2}),
    "recurrent_gemma": ("RecurrentGemmaForCausalLM", FAMILIES["recurrent-gemma"][1]),
    "granitemoehybrid": ("GraniteMoeHybridForCausalLM", FAMILIES["granite4"][1]),
    "qwen3_next": ("Qwen3NextForCausalLM", FAMILIES["qwen3-next"][1]),
}
OURS = ("rwkv5", "rwkv7", "recurrent_gemma")  # models of this package
pytestmark = pytest.mark.engine
LISTENING = {"skip_tokenizer_init": False, "max_model_len": 448, "max_num_batched_tokens": 2048}
CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
DRAFT = {"method": "ngram", "num_speculative_tokens": 2}

TWO = {"tensor_parallel_size": 2}

# model ("" is the tiny Llama), policy, options, and what the message must name
REFUSED: list[tuple[str, str | None, dict[str, Any], str]] = [
    ("", "snappkv", {}, "unknown cache policy 'snappkv'; allowed: raw, fp16"),
    ("", "snapkv(budget=0)", {}, "budget=0 is not above sinks + window"),
    ("", "fp16", {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "drop --scheduler"),
    ("", "kivi-2bit+layers(first=1,last=1)", {}, "takes all of the model's 2 layers"),
    ("", "kivi-4bit(group=128)", {}, "group 128 does not divide head size 64"),
    ("", "kivi-4bit", {"block_size": 64}, "residual 128 does not divide the block size 64"),
    ("", "kivi-4bit", {"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
    ("", "fp16", {"dtype": "float32", "kv_cache_dtype": "bfloat16"}, "drop it, or where the check"),
    ("", "kivi-4bit", {"kv_transfer_config": CONNECTOR}, "a KV connector; drop"),
    ("deepseek_v2", "fp16", {}, "multi-head latent attention (MLA)"),
    ("whisper", "fp16", LISTENING, "encoder-decoder models"),
    ("bloom", "snapkv(budget=64)", {}, "ALiBi; layer 0 is one"),
    ("gemma2", "expected-attention(budget=64)", {}, "has a logit soft cap of 5.0"),
    ("gemma3n_text", "fp16", {}, "KV caches shared between layers; layer 3 is one"),
    ("mamba2", "fp16", {}, "attention-free models"),
    ("rwkv5", "fp16", {}, "attention-free models"),
    ("rwkv7", "fp16", {}, "attention-free models"),
    *((kind, None, TWO, "drop --tensor-parallel-size") for kind in OURS),
    ("recurrent_gemma", "fp16", {}, "is for layers of full attention, and"),
    ("granitemoehybrid", "kivi-2bit+layers(first=1,last=0)", {}, "layers of another kind"),
    ("qwen3_next", "fp16", {}, "give --dtype bfloat16"),
    # the last ones: what vLLM imports for them keeps other engines of the process from starting
    *((kind, None, {"speculative_config": DRAFT}, "speculative decoding with") for kind in OURS),
    ("", "kivi-4bit", {"speculative_config": DRAFT}, "speculative decoding"),
]  # fmt: skip


@pytest.fixture(scope="module")
def refusals(program: Program, tiny: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    from transformers import AutoConfig, WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer

    register_configs()
    folders = {"": tiny}
    for kind, (architecture, options) in MODELS.items():
        config = AutoConfig.for_model(kind, **options)
        config.architectures = [architecture]
        folders[kind] = str(tmp_path_factory.mktemp(kind))
        config.save_pretrained(folders[kind])
    vocabulary = {"<|endoftext|>": 0, **{chr(300 + i): i for i in range(1, 256)}}
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=[])
    WhisperProcessor(WhisperFeatureExtractor(), tokenizer).save_pretrained(folders["whisper"])
    bare = {"skip_tokenizer_init": True, "load_format": "dummy"}
    cases = [
        (folders[model], policy, {**(bare if model else {}), **options})
        for model, policy, options, _ in REFUSED
    ]
    found: list[str] = program("refused_each", cases=cases)
    return found


@pytest.mark.parametrize("case", range(len(REFUSED)), ids=[named for *_, named in REFUSED])
def test_what_cannot_work_is_refused_at_start(refusals: list[str], case: int) -> None:
    assert REFUSED[case][3] in refusals[case]


def test_too_little_memory_is_refused_by_vllms_own_check(program: Program, tiny: str) -> None:
    little = {"policy": "kivi-4bit", "kv_cache_memory_bytes": 300_000}
    assert "max seq len (2048)" in program("refused", model=tiny, **little)


def test_a_filtered_plugin_is_noticed_and_refused(program: Program, tiny: str) -> None:
    message = program("refused", {"VLLM_PLUGINS": ""}, model=tiny, policy="kivi-4bit")
    assert "the cache policy is not active in this worker" in message
