"""The program of ``test_rotary``: see ``tests.engine.programs``."""

from __future__ import annotations

from typing import Any


def rotary(model: str, scaling: dict[str, Any], modules: dict[str, Any]) -> dict[str, Any]:
    """How far our rotary embedding is from vLLM's modules: of the model's layers, and of others.

    Args:
        model: a Llama.
        scaling: its ``rope_parameters``.
        modules: name -> arguments of vLLM's ``get_rope``.

    """
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    from cache_policies.vllm_plugin.rotary import rope_from
    from tests.engine.programs import _generate, engine

    def error(rope: Any, module: Any) -> float:
        position, x = torch.tensor([0, 3, 250]), torch.randn(3, 2 * rope.head_size)
        # LongRoPE's module has no native form of its own; its forward is one
        want = getattr(module, "forward_native", module.forward)(position, x.clone(), x.clone())[0]
        by_head = x.unflatten(1, (2, -1)).transpose(0, 1)
        got = rope.rotate(by_head, position).transpose(0, 1).flatten(1)
        return float((got - want).abs().max())

    llm = engine(model, "fp16", hf_overrides={"rope_parameters": scaling}, max_model_len=1024)
    prompt, answers = [i % 250 for i in range(300)], []
    for method in ("expected-attention(ratio=0.5)", "streaming-llm(ratio=0.5,positions=cache)"):
        answers += _generate(llm, [prompt], 4, extra_args={"cache_policy": method})
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
    layers = [layer.self_attn for layer in worker.get_model().model.layers]
    ropes = [layer.attn.impl._layer.rope for layer in layers]
    same = [r.table is x.rotary_emb.cos_sin_cache for r, x in zip(ropes, layers, strict=True)]
    with set_current_vllm_config(llm.llm_engine.vllm_config):
        others = {name: get_rope(**given, dtype=torch.float32) for name, given in modules.items()}
    return {
        "answers": [len(answer["tokens"][0]) for answer in answers],
        "same": same,
        "layers": [error(r, x.rotary_emb) for r, x in zip(ropes, layers, strict=True)],
        "modules": {name: error(rope_from(m), m) for name, m in others.items()},
    }


def biased(model: str, policies: list[str], longest: int) -> dict[str, list[float]]:
    """Log probabilities of 64 forced tokens after a prompt, per policy.

    Args:
        model: with large key biases.
        policies: the engines'.
        longest: ``max_model_len``.

    """
    from vllm import SamplingParams

    from tests.engine.programs import engine

    found = {}
    text = [(i * 37) % 250 for i in range(400)]
    for policy in policies:
        llm = engine(model, policy, max_model_len=longest, max_num_batched_tokens=64,
                     skip_tokenizer_init=True)  # fmt: skip
        parameters = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0)
        (out,) = llm.generate([{"prompt_token_ids": text}], parameters, use_tqdm=False)
        steps = zip(text[300:], out.prompt_logprobs[300:], strict=True)
        found[policy] = [step[token].logprob for token, step in steps]
        del llm
    return found
