"""The commands ``kvthrift loadtest``, ``compare`` and ``report``."""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loadtest.commands.display import waiting
from loadtest.commands.exporter import Exporter, exporter
from loadtest.commands.given import read_api_key, read_extra, read_pattern
from loadtest.commands.rows import ARGUMENTS, Ordered, by_model, options
from loadtest.commands.run import console, finish, run_once, safe_names
from loadtest.commands.search import search as search_rate
from loadtest.commands.session import Settings
from loadtest.errors import CANNOT_WRITE, SOME_FAILED, LoadTestError
from loadtest.hide import public_url
from loadtest.measuring.goodput import Goals
from loadtest.measuring.scrape import USUAL
from loadtest.sending.arrivals import ARRIVALS, parse_arrivals
from loadtest.sending.client import ENDPOINTS, Target, find_target, wait_for_server
from loadtest.workloads import WORKLOADS, parse_workload

if TYPE_CHECKING:
    from loadtest.measuring.summary import Summary
    from loadtest.sending.arrivals import Arrivals

WorkloadText = Annotated[
    str,
    typer.Option(
        "--workload", "-w", help=f"what to send: {', '.join(WORKLOADS)}, as name(key=value,...)"
    ),
]
ArrivalsText = Annotated[
    list[str],
    typer.Option(
        "--arrivals", "-a", help=f"when: {', '.join(ARRIVALS)}; several for several loads"
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="fixes prompts and schedule")]
Out = Annotated[Path, typer.Option("--out", "-o", help="folder for the results")]
Warmup = Annotated[int, typer.Option(min=0, help="requests before the measured ones")]
ErrorRate = Annotated[
    float, typer.Option(min=0, max=1, help="stop when more than this share of requests failed")
]
GoodputText = Annotated[str | None, typer.Option("--goodput", help="goals, e.g. ttft:2s,tpot:80ms")]
Interval = Annotated[float, typer.Option(min=0.05, help="seconds between scrapes")]
DEFAULT_WORKLOAD = "passkey"
DEFAULT_ARRIVALS = ["closed(concurrency=4)"]


def register(app: typer.Typer) -> None:
    """Add the commands to ``kvthrift``."""
    app.command()(loadtest)
    app.command(
        cls=Ordered,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        options_metavar="MODEL [OPTIONS] [--model MODEL [OPTIONS]]...",
    )(compare)
    app.command()(report)
    app.command()(canary)


def loadtest(
    url: Annotated[str, typer.Argument(help="an OpenAI-compatible server")],
    workload: WorkloadText = DEFAULT_WORKLOAD,
    arrivals: ArrivalsText = DEFAULT_ARRIVALS,
    seed: Seed = 0,
    out: Out = Path("loadtest-results"),
    model: Annotated[str | None, typer.Option(help="served model (default: the first)")] = None,
    endpoint: Annotated[
        str, typer.Option(help="completions, chat, or auto: what the workload asks for")
    ] = "auto",
    cache_policy: Annotated[
        str | None, typer.Option(help="sent with each request, for servers of kvthrift")
    ] = None,
    extra_body: Annotated[str | None, typer.Option(help="JSON added to each request")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="file with the API key (else OPENAI_API_KEY)")
    ] = None,
    keep_thinking: Annotated[
        bool, typer.Option(help="write down the text of a model's thinking too")
    ] = False,
    tokenizer: Annotated[
        str, typer.Option(help="server, approximate, or a folder or hub name")
    ] = "server",
    label: Annotated[str | None, typer.Option(help="name of the row")] = None,
    max_concurrency: Annotated[
        int | None, typer.Option(min=1, help="most requests under way at a time")
    ] = None,
    goodput: GoodputText = None,
    search: Annotated[
        str | None, typer.Option(help="LOW-HIGH: find the highest rate that meets --goodput")
    ] = None,
    attainment: Annotated[
        float, typer.Option(min=0, max=1, help="share of requests that must meet the goals")
    ] = 0.95,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds a request may take")] = 600.0,
    warmup: Warmup = 2,
    warm_cache: Annotated[
        bool, typer.Option(help="let vLLM find prompts of earlier runs in its prefix cache")
    ] = False,
    max_error_rate: ErrorRate = 0.5,
    metrics: Annotated[
        list[str] | None, typer.Option(help="Prometheus endpoints (default: URL/metrics)")
    ] = None,
    metric_names: Annotated[
        str | None, typer.Option(help="regular expression of further metrics to keep")
    ] = None,
    interval: Interval = 1.0,
    pid: Annotated[
        int | None, typer.Option(min=1, help="server process whose memory is read too")
    ] = None,
    wait: Annotated[
        float, typer.Option(min=0, help="seconds to wait for a server that starts")
    ] = 0.0,
    serve_metrics: Annotated[
        str | None, typer.Option(help="HOST:PORT where Prometheus finds what runs now")
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="keep what an interrupted run in --out finished")
    ] = False,
) -> None:
    """Replay a workload against a server, score the answers, read its metrics, write a report."""
    if endpoint not in ENDPOINTS:
        raise LoadTestError(f"--endpoint {endpoint!r}: allowed: {', '.join(ENDPOINTS)}")
    settings = Settings(
        workload=parse_workload(workload),
        arrivals=parse_arrivals(arrivals[0]),
        label=label or cache_policy or "run",
        policy=cache_policy,
        seed=seed,
        tokenizer=tokenizer,
        max_concurrency=max_concurrency,
        warmup=warmup,
        max_error_rate=max_error_rate,
        goals=Goals.parse(goodput) if goodput else None,
        metrics=tuple(metrics) if metrics else None,
        metric_names=f"{USUAL}|{read_pattern(metric_names)}" if metric_names else USUAL,
        interval=interval,
        pid=pid,
        resume=resume,
    )
    extra = read_extra(extra_body, cache_policy)
    if wait:
        with waiting(console, f"waiting for {public_url(url)}") as note:
            wait_for_server(url, wait, note)
    target = find_target(
        url, model, endpoint=endpoint, api_key=read_api_key(api_key_file), extra=extra,
        timeout=timeout, keep_thinking=keep_thinking,
    )  # fmt: skip
    _make_folder(out)
    with exporter(serve_metrics) as export:
        if search:
            if len(arrivals) > 1:
                raise LoadTestError("--search takes one --arrivals, whose rate it changes")
            run = partial(run_once, warm_cache=warm_cache, export=export)
            search_rate(settings, target, search, attainment, out, run)
            return
        loads = [parse_arrivals(text) for text in arrivals]
        status = _loads(settings, target, loads, out, warm_cache=warm_cache, export=export)
    raise typer.Exit(status)


def _loads(
    settings: Settings,
    target: Target,
    loads: list[Arrivals],
    out: Path,
    *,
    warm_cache: bool,
    export: Exporter | None,
) -> int:
    """A run for each of the arrivals, and their report; the first status that is not 0."""
    done: list[Summary] = []
    folders: list[Path] = []
    status = 0
    for load, name in zip(loads, safe_names([str(load) for load in loads]), strict=True):
        folder = out if len(loads) == 1 else out / name
        folder.mkdir(parents=True, exist_ok=True)
        one = replace(settings, arrivals=load)
        summary, code = run_once(one, target, folder, warm_cache=warm_cache, export=export)
        done.append(summary)
        folders.append(folder)
        status = status or code
        if summary.stopped:
            break
    finish(folders, out, done)
    return status


def compare(
    context: typer.Context,
    # these three are read in their order, by by_model
    model: Annotated[  # noqa: ARG001
        list[str] | None,
        typer.Option(help="a further model; --policy and --stock after it are its own"),
    ] = None,
    policy: Annotated[  # noqa: ARG001
        list[str] | None, typer.Option("--policy", "-p", help="cache policy; one row each")
    ] = None,
    stock: Annotated[  # noqa: ARG001
        bool, typer.Option(help="add vLLM's own cache as the first row")
    ] = False,
    workload: WorkloadText = DEFAULT_WORKLOAD,
    arrivals: ArrivalsText = DEFAULT_ARRIVALS,
    seed: Seed = 0,
    out: Out = Path("compare-results"),
    memory: Annotated[str, typer.Option(help="cache memory of each server")] = "256M",
    goodput: GoodputText = None,
    warmup: Warmup = 2,
    max_error_rate: ErrorRate = 0.5,
    interval: Interval = 0.5,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds a request may take")] = 600.0,
) -> None:
    """Serve MODEL under each policy in turn, run the same workload on each, compare.

    Policies that differ only in their method share a server. Further options go to the server
    (--max-model-len 4096 ...). Runs that are already whole in --out are kept. Several models get
    the same text; one without a policy is served with vLLM's own cache.
    """
    from loadtest.commands.compare import Comparison, run_comparison

    first = next(iter(context.args[:1]), "-")
    named = None if first.startswith("-") else first
    asked = by_model(named, context.meta[ARGUMENTS])
    if not asked:
        raise LoadTestError("which model? Name it first, as for kvthrift serve, or with --model")
    comparison = Comparison.of(
        **options(asked),
        memory=memory,
        flags=context.args[1:] if named else list(context.args),
        settings=Settings(
            workload=parse_workload(workload),
            arrivals=parse_arrivals(arrivals[0]),
            seed=seed,
            warmup=warmup,
            max_error_rate=max_error_rate,
            goals=Goals.parse(goodput) if goodput else None,
            interval=interval,
        ),
        arrivals=[parse_arrivals(text) for text in arrivals],
        timeout=timeout,
    )
    _make_folder(out)
    raise typer.Exit(run_comparison(comparison, out))


def report(
    folders: Annotated[list[Path], typer.Argument(help="folders of runs, or folders of those")],
    out: Out = Path(),
    title: Annotated[str, typer.Option(help="heading of the page")] = "kvthrift load test",
) -> None:
    """Write report.html and its pictures again, from any number of runs."""
    from loadtest.report import read_runs, table, write_report

    runs = read_runs(folders)
    console.print(table([run.summary for run in runs], title))
    console.print(f"report: {write_report(runs, out, title)}", soft_wrap=True, highlight=False)


def canary(
    url: Annotated[str, typer.Argument(help="an OpenAI-compatible server")],
    model: Annotated[str | None, typer.Option(help="served model (default: the first)")] = None,
    every: Annotated[float, typer.Option(min=1, help="seconds from round to round")] = 300.0,
    rounds: Annotated[int, typer.Option(min=0, help="how many; 0: until stopped")] = 0,
    lengths: Annotated[
        str | None, typer.Option(help="tokens of the texts, e.g. 500|2000 (default: those, if fit)")
    ] = None,
    at_least: Annotated[
        float, typer.Option(min=0, max=1, help="share of keys below which the exit status is 1")
    ] = 0.0,
    seed: Annotated[
        int | None, typer.Option(min=0, help="of the first round (default: the time)")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="file with the API key (else OPENAI_API_KEY)")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds a request may take")] = 120.0,
    wait: Annotated[
        float, typer.Option(min=0, help="seconds to wait for a server that starts")
    ] = 0.0,
    serve_metrics: Annotated[
        str | None, typer.Option(help="HOST:PORT where Prometheus finds kvthrift_canary_*")
    ] = None,
) -> None:
    """Ask a server for hidden keys every few minutes, and watch its answers for loops."""
    from loadtest.commands import canary as birds

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if wait:
        wait_for_server(url, wait)
    target = find_target(url, model, api_key=read_api_key(api_key_file), timeout=timeout)
    sizes = birds.read_lengths(lengths, target)
    with birds.gauges(target, every, serve_metrics) as shown:

        def show(done: birds.Round) -> None:
            shown.show(done)
            console.print(done.line(target.model), highlight=False, soft_wrap=True)

        first = int(time.time()) if seed is None else seed
        done = birds.watch(target, sizes, every=every, rounds=rounds, seed=first, show=show)
    bad = [r for r in done if r.failed or (r.found or 0.0) < at_least]
    if bad:
        few = f"fewer keys than --at-least {at_least:g}"
        why = "requests that failed" if any(r.failed for r in bad) else few
        console.print(f"{len(bad)} of {len(done)} rounds: {why}", highlight=False, soft_wrap=True)
        raise typer.Exit(SOME_FAILED)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LoadTestError(f"cannot write {folder}: {error.strerror}", CANNOT_WRITE) from None
