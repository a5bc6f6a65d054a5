"""How far each codec moves the next-token distributions, on real text, inside the engine.

Usage: ``python -m benchmarks.quality_kl [--tokens 1024] [--policy P ...]``

The text is the documentation that Python carries (`pydoc_data.topics`). Prefill runs in chunks
of 128 tokens, so nearly every position is predicted from stored, encoded tokens. Prints the
mean over positions of KL(fp16 || codec) in nats, and how often the most likely token agrees.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

POLICIES = (
    "fp16",
    "raw",
    "bf16",
    "int8",
    "kivi(k_bits=8,v_bits=8)",
    "flexgen-4bit",
    "kivi-4bit",
    "kivi(k_bits=4,v_bits=2)",
    "kivi(k_bits=2,v_bits=4)",
    "kivi-2bit",
    "rotated-4bit",
    "rotated(k_bits=4,v_bits=3)",
    "rotated-3bit",
)
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "2",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def collect(policy: str, tokens: int, out: Path) -> None:
    """Save the log-probabilities of every prompt position, ``[tokens - 1, vocabulary]``."""
    from pydoc_data import topics

    from vllm import LLM, SamplingParams

    from server.models import get_model

    llm = LLM(
        str(get_model("smollm2-135m")), dtype="float32", enforce_eager=True, max_model_len=4096,
        max_num_batched_tokens=128, kv_cache_memory_bytes=512 << 20, enable_prefix_caching=False,
        additional_config={"cache_policy": policy},
    )  # fmt: skip
    text = " ".join(
        topics.topics[name] for name in ("naming", "execmodel", "import", "customization")
    )
    prompt = llm.get_tokenizer()(text).input_ids[:tokens]
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
    model, seen = worker.get_model(), []
    compute = model.compute_logits

    def record(hidden: torch.Tensor) -> torch.Tensor:
        logits = compute(hidden)
        seen.append(logits.float().log_softmax(-1).half())
        return logits

    model.compute_logits = record
    parameters = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0)
    llm.generate([{"prompt_token_ids": prompt}], parameters, use_tqdm=False)
    positions = [part for part in seen if part.shape[0] > 1]  # a chunk's; one row is a sample's
    torch.save(torch.cat(positions), out)


def main() -> None:
    """Run every policy in its own process and compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--policy", action="append")
    parser.add_argument("--collect", nargs=2, metavar=("POLICY", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.collect:
        collect(options.collect[0], options.tokens, Path(options.collect[1]))
        return
    truth: torch.Tensor | None = None
    print(f"{'':26}{'mean KL, nats':>15}{'same top token':>16}{'positions':>11}")
    for policy in ("fp16", *(p for p in options.policy or POLICIES if p != "fp16")):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "log_probabilities.pt"
            command = [sys.executable, __file__, "--tokens", str(options.tokens)]
            subprocess.run(
                [*command, "--collect", policy, str(file)], check=True, capture_output=True,
                env={**os.environ, **ENVIRONMENT},
            )  # fmt: skip
            found = torch.load(file).float()
        truth = found if truth is None else truth
        kl = (truth.exp() * (truth - found)).sum(-1)
        same = (truth.argmax(-1) == found.argmax(-1)).float().mean()
        print(f"{policy:26}{kl.mean():15.5f}{same:16.1%}{len(kl):11}", flush=True)


if __name__ == "__main__":
    main()
