"""The main job, first form: serve the embedded model under several policies and measure.

Usage: ``python -m loadtest.demo [--policy P ...] [--out FOLDER]``

For every policy a server is started with the same cache memory, passkey prompts are sent
through /v1/completions, the answers scored and /metrics read.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from cache_policies.policy import parse
from loadtest.client import Answer, Client
from loadtest.haystack import TEXTS
from loadtest.passkey import Case, cases
from loadtest.process import ServerError, running_server
from loadtest.scoring import exact_key, partial_key
from loadtest.scrape import KV_USE, PREEMPTIONS, labels, sample, watch_peak
from server.capacity import ModelShape, capacity
from server.models import get_model
from server.serve import default_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

MODEL = "smollm2-135m"
POLICIES = ("fp16", "flexgen-4bit", "kivi-4bit", "kivi-2bit")
MEMORY = 256 * 2**20
MAX_LEN = 4096
CONCURRENCY = 4
GRID = ((400, 0.1), (400, 0.5), (400, 0.9), (2800, 0.5))
SCHEMA = 1


@dataclass(frozen=True)
class Row:
    """Result of one policy. Times in seconds, sizes in bytes, shares 0..1.

    Attributes:
        policy: canonical policy string.
        capacity_tokens: tokens the pool holds in requests of MAX_LEN, as vLLM reports it.
        bytes_per_token: store bytes of a token, all layers.
        compression_ratio: 16-bit bytes over our bytes, for a request of MAX_LEN, ring included.
        exact: mean exact-key score; exact_7 and exact_64 by length of the key.
        partial: mean partial-key score.
        ttft: median; itl: median over requests of mean seconds per later token.
        output_tokens_per_second: of all requests over the whole run.
        peak_kv_use: highest share of the pool in use that a scrape saw; None: no scrape worked.
        requests: answered; errors: not answered.

    """

    policy: str
    capacity_tokens: int
    bytes_per_token: float
    compression_ratio: float
    exact: float
    exact_7: float
    exact_64: float
    partial: float
    ttft: float
    itl: float
    output_tokens_per_second: float
    peak_kv_use: float | None
    preemptions: float | None
    requests: int
    errors: int
    start_seconds: float
    run_seconds: float


def main() -> None:
    """Run every policy, print the table, write results.json."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.demo")
    parser.add_argument("--policy", action="append", help=f"default: {' '.join(POLICIES)}")
    parser.add_argument("--out", type=Path, default=Path("demo-results"))
    options = parser.parse_args()
    policies = [str(parse(p)) for p in options.policy or POLICIES]
    options.out.mkdir(parents=True, exist_ok=True)
    # A terminated run must stop its server too: SystemExit unwinds the context managers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console()
    begin = time.monotonic()
    with console.status(f"getting {MODEL}"):
        get_model(MODEL)
    rows: list[Row] = []
    with _progress(console) as progress:
        for policy in policies:
            try:
                rows.append(_run_policy(policy, options.out, progress))
            except ServerError as error:
                console.print(f"[red]{policy}: {error}[/red]")
            _write(rows, options.out / "results.json")
    console.print(_table(rows))
    console.print(
        f"{time.monotonic() - begin:.0f} s in all; results: {options.out / 'results.json'}, "
        f"answers: {options.out}/answers-*.jsonl"
    )
    if len(rows) < len(policies) or any(row.errors for row in rows):
        sys.exit(1)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:24}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} {task.fields[note]}"),
        TimeElapsedColumn(),
        console=console,
    )


def _run_policy(policy: str, out: Path, progress: Progress) -> Row:
    task = progress.add_task(policy, total=None, note="starting the server")
    # Eager: compiling would take longer than the run, and attention is not compiled anyway.
    arguments = [MODEL, "--cache-policy", policy, "--kv-cache-memory-bytes", str(MEMORY)]
    arguments += ["--max-model-len", str(MAX_LEN), "--max-num-batched-tokens", "1024"]
    arguments += ["--enforce-eager", "--disable-uvicorn-access-log"]
    log = out / f"server-{policy}.log"

    def waiting(seconds: float) -> None:
        progress.update(task, note=f"starting the server, {seconds:.0f} s")

    with running_server(arguments, log, on_wait=waiting) as server:
        row, answers = asyncio.run(
            _measure(policy, server.url, server.start_seconds, progress, task)
        )
    with (out / f"answers-{policy}.jsonl").open("w") as file:
        for case, answer in answers:
            file.write(json.dumps({"case": asdict(case), "answer": asdict(answer)}) + "\n")
    return row


async def _measure(
    policy: str, url: str, start_seconds: float, progress: Progress, task: TaskID
) -> tuple[Row, list[tuple[Case, Answer]]]:
    async with Client(url) as client:
        work = await _cases(client)
        progress.update(task, total=len(work), note="requests")
        await client.complete("Warm-up, unlike any prompt that is measured:", 4)
        gate = asyncio.Semaphore(CONCURRENCY)

        async def one(case: Case) -> Answer:
            async with gate:
                answer = await client.complete(case.prompt, case.max_tokens)
            progress.update(task, advance=1)
            return answer

        begin = time.monotonic()
        async with watch_peak(client, KV_USE) as use:
            answers = await asyncio.gather(*(one(case) for case in work))
        seconds = time.monotonic() - begin
        text = await client.metrics()
    done = [(c, a) for c, a in zip(work, answers, strict=True) if a.error is None]
    if not done:
        raise ServerError(f"no request was answered; the first error: {answers[0].error}")
    size = capacity(
        parse(policy), ModelShape.from_folder(get_model(MODEL), _dtype()), MEMORY, MAX_LEN
    )
    row = Row(
        policy=policy,
        capacity_tokens=int(labels(text, "vllm:cache_config_info")["kv_cache_size_tokens"]),
        bytes_per_token=size.bytes_per_token,
        compression_ratio=size.ratio,
        exact=_mean(done, exact_key),
        exact_7=_mean([d for d in done if len(d[0].key) == 7], exact_key),
        exact_64=_mean([d for d in done if len(d[0].key) == 64], exact_key),
        partial=_mean(done, partial_key),
        ttft=statistics.median(a.ttft for _, a in done),
        itl=statistics.median(t for _, a in done if (t := a.tpot) is not None),
        output_tokens_per_second=sum(a.output_tokens for _, a in done) / seconds,
        peak_kv_use=max(use) if use else None,
        preemptions=sample(text, PREEMPTIONS),
        requests=len(done),
        errors=len(answers) - len(done),
        start_seconds=start_seconds,
        run_seconds=seconds,
    )
    note = f"requests, {row.run_seconds:.0f} s, exact {row.exact:.2f}"
    progress.update(task, note=note)
    return row, list(zip(work, answers, strict=True))


async def _cases(client: Client) -> list[Case]:
    sentences = sorted({f" {s}" for text in TEXTS.values() for s in text})
    counted = await asyncio.gather(*(client.count_tokens(s) for s in sentences))
    table = dict(zip(sentences, counted, strict=True))
    return list(cases(lambda texts: [table[t] for t in texts], grid=GRID))


def _dtype() -> torch.dtype:
    dtype: torch.dtype = getattr(torch, default_dtype() or "bfloat16")
    return dtype


def _mean(done: list[tuple[Case, Answer]], score: Callable[[str, str], float]) -> float:
    return statistics.fmean(score(answer.text, case.key) for case, answer in done)


def _write(rows: list[Row], path: Path) -> None:
    settings = {
        "model": MODEL,
        "memory_bytes": MEMORY,
        "max_model_len": MAX_LEN,
        "concurrency": CONCURRENCY,
        "grid": GRID,
    }
    result = {"schema": SCHEMA, "settings": settings, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(result, indent=2) + "\n")


def _table(rows: list[Row]) -> Table:
    table = Table(
        title=f"{MODEL}, {MEMORY // 2**20} MiB of cache, passkey prompts, {CONCURRENCY} at a time",
        padding=(0, 0),
    )
    headings = ("policy", "capacity\ntokens", "bytes/\ntoken", "x\n16 bit", "exact\n7 / 64",
                "partial", "TTFT\ns", "ITL\nms", "out\ntok/s", "peak\nKV", "err")  # fmt: skip
    for heading in headings:
        side = "left" if heading == "policy" else "right"
        table.add_column(heading, justify=side, no_wrap=True)  # type: ignore[arg-type]
    for row in rows:
        peak = "?" if row.peak_kv_use is None else f"{row.peak_kv_use:.0%}"
        cells = (
            row.policy,
            f"{row.capacity_tokens:,}",
            f"{row.bytes_per_token:,.0f}",
            f"{row.compression_ratio:.2f}",
            f"{row.exact_7:.2f} / {row.exact_64:.2f}",
            f"{row.partial:.2f}",
            f"{row.ttft:.1f}",
            f"{row.itl * 1e3:.0f}",
            f"{row.output_tokens_per_second:.1f}",
            peak,
            str(row.errors),
        )
        table.add_row(*cells)
    return table


if __name__ == "__main__":
    main()
