"""Long prompts through the server: time and memory against length, stock vLLM beside policies.

Usage: ``python -m benchmarks.long_context [--full] [--policy fp16 ...] [--model gemma3-270m ...]
[--lengths 4096 8192] [--memory 1G] [--minutes 10] [--requests 1] [--out long-context]``

A server for each model and policy (``stock`` is vLLM's own cache), with the same cache memory and
the same flags; one request at a time, ``--requests`` of each length. A length is that of prompt and
answer. What a policy cannot hold is said so (the server refuses to start with it); what would not
end within the time that is left is not begun. Prints a table with fitted exponents, and leaves
``results.json``, ``table.md`` and ``plot.png``; ``--full`` goes to 128K tokens in up to 90 minutes.
What ``--out`` holds already is shown and not measured again, so a run can go on where one ended.

Models: Gemma 3 270M, trained on 32K tokens, and random weights in the attention shape of
Llama 3 8B (32 query and 8 KV heads of 128) with two layers and a small MLP, for cost alone.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.long_context_report import OUT_OF_MEMORY, Row, identity, read_rows, write_report
from loadtest.commands.process import ServerError, running_server
from loadtest.commands.run import run_once, safe_name
from loadtest.commands.session import Settings
from loadtest.errors import LoadTestError
from loadtest.files import METRICS_CSV
from loadtest.measuring.scrape import USUAL, read_samples
from loadtest.measuring.server_side import series
from loadtest.sending.arrivals import parse_arrivals
from loadtest.sending.client import find_target
from loadtest.workloads import parse_workload
from server.models import get_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loadtest.commands.process import Server
    from loadtest.measuring.summary import Summary

STOCK = "stock"
POLICIES = (
    STOCK, "fp16", "kivi-4bit", "snapkv(budget=1024)+kivi-4bit", "streaming-llm(window=1020)",
    "infllm", "sparse-prefill(coverage=0.95)",
)  # fmt: skip
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
QUICK = LENGTHS[:3]
ANSWER = 32  # tokens
LLAMA = "llama3-8b-shape"
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
PARTS = ("queue", "prefill")  # of a request, as vLLM's histograms have them


@dataclass(frozen=True)
class Model:
    """What is served.

    Attributes:
        name: as the user says it.
        longest: tokens it can take.
        memory: of the cache, in bytes, by default: less than stock vLLM needs for the longest.
        flags: for the server.
        policies: that it is served under, by default.

    """

    name: str
    longest: int
    memory: int
    flags: tuple[str, ...] = ()
    policies: tuple[str, ...] = POLICIES

    def folder(self, out: Path) -> str:
        """What ``kvthrift serve`` is given."""
        return str(llama_shape(out / self.name)) if self.name == LLAMA else self.name


MODELS = {
    m.name: m
    for m in (
        Model("gemma3-270m", 32768, 128 << 20),
        # random weights attend to everything alike: a share of attention would read nearly all
        Model(
            LLAMA, 131072, 640 << 20, ("--load-format", "dummy"),
            (*POLICIES[:-1], "sparse-prefill(topk=32)+kivi-4bit"),
        ),
    )
}  # fmt: skip


def llama_shape(folder: Path, layers: int = 2) -> Path:
    """A configuration of Llama 3 8B's attention; SmolLM2's tokenizer, weights by vLLM's dummy."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in get_model("smollm2-135m").glob("*token*"):
        shutil.copy(file, folder)
    known = json.loads((get_model("smollm2-135m") / "config.json").read_text(encoding="utf-8"))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "num_hidden_layers": layers, "intermediate_size": 1024, "rms_norm_eps": 1e-5,
        "vocab_size": known["vocab_size"], "tie_word_embeddings": True, "rope_theta": 500000.0,
        "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
        "bos_token_id": known.get("bos_token_id"), "eos_token_id": known.get("eos_token_id"),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


class Clock:
    """Time that is left, and what a length will take judging by the one before it."""

    def __init__(self, minutes: float) -> None:
        self.until = time.monotonic() + 60 * minutes

    def share(self, servers: int) -> float:
        """Monotonic seconds until which one of so many servers may run."""
        now = time.monotonic()
        return now + max(0.0, self.until - now) / max(1, servers)


def expected(rows: list[Row], length: int, requests: int) -> float:
    """Seconds that requests of a length will take: attention grows by its square."""
    known = [r for r in rows if r.ttft is not None]
    if not known:
        return 0.0
    last = known[-1]
    assert last.ttft is not None
    return requests * (last.ttft * (length / last.length) ** 2 + ANSWER * (last.tpot or 0.0))


def measure(
    model: Model, policy: str, memory: int, known: list[Row], until: float, given: Any
) -> Iterator[Row]:
    """Rows of one model and policy that are not known yet.

    Lengths that cannot be held are tried from the longest down.
    """
    blank = Row(model=model.name, policy=policy, length=0, memory=memory)
    known = [r for r in known if replace(blank, length=r.length) == identity(r)]
    done = {r.length for r in known}
    left = sorted(n for n in given.lengths if n <= model.longest and n not in done)
    while left:
        try:
            with _server(model, policy, memory, left[-1], given.out) as server:
                yield from _lengths(blank, server, left, known, until, given)
            return
        except ServerError as error:
            why = _reason(str(error), given.out)
            yield replace(blank, length=left.pop(), note=why)
            if not why.startswith(OUT_OF_MEMORY):
                yield from (replace(blank, length=n, note=why) for n in left)
                return


def _server(model: Model, policy: str, memory: int, longest: int, out: Path) -> Any:
    chosen = [] if policy == STOCK else ["--cache-policy", policy]
    flags = [
        model.folder(out), *chosen, *model.flags, "--kv-cache-memory-bytes", str(memory),
        "--max-model-len", str(longest), "--max-num-seqs", "1", "--max-num-batched-tokens", "1024",
        "--enforce-eager", "--disable-uvicorn-access-log",
    ]  # fmt: skip
    return running_server(flags, out / "server.log")


def _reason(message: str, out: Path) -> str:
    """Why a server did not start, in a line."""
    log = (out / "server.log").read_text(encoding="utf-8", errors="replace")
    needed = re.search(r"\(?([\d.]+ GiB) KV cache is needed", log)
    if needed:
        return f"{OUT_OF_MEMORY}: one request needs {needed[1]}"
    errors = [x.strip() for x in log.splitlines() if re.search(r"Error|error:", x)]
    return f"no server: {errors[-1] if errors else message.splitlines()[-1]}"[:300]


def _lengths(
    blank: Row, server: Server, lengths: list[int], known: list[Row], until: float, given: Any
) -> Iterator[Row]:
    rows = sorted(known, key=lambda r: r.length)
    for length in lengths:
        row = replace(blank, length=length)
        wanted, left = expected(rows, length, given.requests), until - time.monotonic()
        if left <= 0 or wanted > left:
            row = replace(row, note=f"not begun: about {wanted:.0f} s, {max(0, left):.0f} s left")
        else:
            row = _one(row, server, given)
        rows.append(row)
        yield row


def _one(row: Row, server: Server, given: Any) -> Row:
    """Requests of one length, one after the other."""
    workload = (
        f"synthetic(requests={given.requests},input=fixed:{row.length - ANSWER},"
        f"output=fixed:{ANSWER})"
    )
    settings = Settings(
        parse_workload(workload), parse_arrivals("closed(concurrency=1)"), label=row.policy,
        seed=row.length, warmup=1, interval=0.25, pid=server.pid,
        metric_names=f"{USUAL}|vllm:request_({'|'.join(PARTS)})_time_seconds_(sum|count)",
    )  # fmt: skip
    folder = given.out / safe_name(f"{row.model}-{row.policy}-{row.length}")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        target = find_target(server.url, None, timeout=given.timeout)
        summary, _ = run_once(settings, target, folder)
    except LoadTestError as error:
        return replace(row, note=f"failed: {error}"[:300])
    return _filled(row, summary, folder)


def _filled(row: Row, summary: Summary, folder: Path) -> Row:
    if not summary.requests.ok:
        kinds = ", ".join(summary.requests.by_error)
        return replace(row, note=f"failed: {kinds}")
    samples = read_samples(folder / METRICS_CSV)
    rss = [v for _, v in series(samples, "process_tree_resident_memory_bytes")]
    engine = sum(_mean_growth(samples, f"vllm:request_{p}_time_seconds") or 0.0 for p in PARTS)
    use, ttft = summary.get("server.kv_use_peak"), summary.get("latency.ttft.mean.value")
    return replace(
        row,
        ttft=ttft,
        outside=ttft - engine if ttft is not None and engine else None,
        tpot=summary.get("latency.tpot.mean.value"),
        pool_peak=None if use is None else use * row.memory,
        rss_before=rss[0] if rss else None,
        rss_peak=max(rss, default=None),
        capacity=summary.get("server.capacity_tokens"),
    )


def _mean_growth(samples: list[Any], name: str) -> float | None:
    """Mean seconds of a histogram over the run."""
    totals = []
    for end in ("_sum", "_count"):
        points = series(samples, name + end)
        totals.append(points[-1][1] - points[0][1] if points else 0.0)
    return totals[0] / totals[1] if totals[1] else None


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """What the user wants."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_context")
    parser.add_argument("--full", action="store_true", help="all lengths and models, 90 minutes")
    parser.add_argument("--policy", nargs="+", dest="policies")
    parser.add_argument("--model", nargs="+", choices=list(MODELS), dest="models")
    parser.add_argument("--lengths", nargs="+", type=int)
    parser.add_argument("--memory", help="of each cache, e.g. 512M (default: by the model)")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--requests", type=int, default=1, help="of each length")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds of a request")
    parser.add_argument("--out", type=Path, default=Path("long-context"))
    given = parser.parse_args(arguments)
    given.models = given.models or (list(MODELS) if given.full else ["gemma3-270m"])
    given.lengths = given.lengths or list(LENGTHS if given.full else QUICK)
    given.minutes = given.minutes or (90.0 if given.full else 10.0)
    if given.memory:
        given.memory = int(given.memory[:-1]) * UNITS[given.memory[-1].upper()]
    return given


def main() -> None:
    """Run everything that time allows; the report is written anew after every row."""
    given = parse()
    given.out.mkdir(parents=True, exist_ok=True)
    # a terminated run must stop its server too: SystemExit unwinds the context managers
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    clock = Clock(given.minutes)
    rows = read_rows(given.out)
    work = [(MODELS[m], p) for m in given.models for p in given.policies or MODELS[m].policies]
    for index, (model, policy) in enumerate(work):
        memory = given.memory or model.memory
        until = clock.share(len(work) - index)
        for row in measure(model, policy, memory, rows[:], until, given):
            rows.append(row)
            print(json.dumps(asdict(row)), flush=True)
            write_report(rows, given.out)
    write_report(rows, given.out)
    print((given.out / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
