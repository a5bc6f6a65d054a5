"""The same workload under several policies, a server each where one is not enough."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from cache_policies.errors import PolicyError
from cache_policies.policy import parse
from loadtest.commands.display import waiting
from loadtest.commands.process import ServerError, running_server
from loadtest.commands.rows import Asked
from loadtest.commands.run import console, finish, run_once, safe_name, safe_names
from loadtest.commands.session import Settings, complete
from loadtest.commands.shared import PROMPTS, UnfitError, shared_items
from loadtest.errors import CANNOT_WRITE, INTERRUPTED, NO_SERVER, SOME_FAILED, LoadTestError
from loadtest.files import SUMMARY
from loadtest.hide import public_arguments, read_key
from loadtest.measuring.summary import Summary
from loadtest.sending.client import find_target

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from loadtest.commands.process import Server
    from loadtest.sending.arrivals import Arrivals

    Served = tuple[str, str | None]  # model and policy

STOCK = "stock vLLM"
PLAN = "comparison.json"
ENDS = (CANNOT_WRITE, INTERRUPTED)  # of a run, and of all that were to follow
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class Variant:
    """A row: a server's policy and what its requests ask for.

    Attributes:
        policy: as a user writes it, or ``stock vLLM``.
        server: the server's policy, a codec; None: vLLM's own cache.
        method: what each request asks for; None on a server without policy.
        model: to serve, where there are several.
        name: of the model in the row's label, where there are several.

    """

    policy: str
    server: str | None
    method: str | None
    model: str | None = None
    name: str = ""

    @classmethod
    def of(cls, text: str) -> Variant:
        """A row from a policy string.

        Raises:
            PolicyError: not a policy.

        """
        policy = parse(text)
        return cls(str(policy), policy.codec_string, str(policy.method))

    @property
    def label(self) -> str:
        """Name of the row."""
        return f"{self.name}: {self.policy}" if self.name else self.policy


def rows_of(asked: Asked, *, alone: bool) -> list[Variant]:
    """Rows of a model; one among several without a policy is served as it is.

    Raises:
        LoadTestError: a bad policy, or nothing to do.

    """
    try:
        rows = [Variant.of(text) for text in asked.policies]
    except PolicyError as error:
        raise LoadTestError(str(error)) from None
    if asked.stock or not (rows or alone):
        rows.insert(0, Variant(STOCK, None, None))
    if not rows:
        raise LoadTestError("nothing to compare: give --policy, or --stock")
    return rows


def short_names(models: Sequence[str]) -> dict[str, str]:
    """Last parts of the models' names, or the whole names where these are alike."""
    last = {model: model.rstrip("/").rpartition("/")[2] for model in models}
    return last if len(set(last.values())) == len(last) else {model: model for model in models}


@dataclass(frozen=True)
class Comparison:
    """What is compared."""

    models: tuple[str, ...]
    variants: tuple[Variant, ...]
    memory: int
    flags: tuple[str, ...]
    settings: Settings
    arrivals: tuple[Arrivals, ...]
    timeout: float

    @classmethod
    def of(
        cls,
        *,
        model: str,
        policies: list[str],
        stock: bool,
        memory: str,
        flags: list[str],
        settings: Settings,
        arrivals: list[Arrivals],
        timeout: float,
        others: Sequence[Asked] = (),
    ) -> Comparison:
        """Check everything before a server is started.

        ``policies`` and ``stock`` are the first model's; ``others`` have their own.

        Raises:
            LoadTestError: nothing to compare, a model twice, a bad policy or memory.

        """
        if any(flag.partition("=")[0] == "--api-key" for flag in flags):
            raise LoadTestError(
                "--api-key would show the key to everybody on this machine; set VLLM_API_KEY, or "
                "nothing: the servers listen on loopback only"
            )
        number, unit = memory[:-1], memory[-1:].upper()
        if unit not in UNITS or not number.isdecimal():
            raise LoadTestError(f"--memory {memory!r}: a whole number followed by K, M or G")
        twice = [str(a) for a, n in Counter(map(str, arrivals)).items() if n > 1]
        if twice:
            raise LoadTestError(f"--arrivals {twice[0]} is given twice")
        asked = [Asked(model, policies, stock), *others]
        models = tuple(one.model for one in asked)
        if len(set(models)) < len(models) or "" in models:
            raise LoadTestError(f"--model: {', '.join(models)}: empty, or the same model twice")
        names = short_names(models)
        rows = [
            row if not others else replace(row, model=one.model, name=names[one.model])
            for one in asked
            for row in rows_of(one, alone=not others)
        ]
        variants = tuple(dict.fromkeys(rows))
        bytes_ = int(number) * UNITS[unit]
        return cls(models, variants, bytes_, tuple(flags), settings, tuple(arrivals), timeout)

    @property
    def plan(self) -> dict[str, Any]:
        """What must be the same for runs to be comparable."""
        return {
            "model": " | ".join(self.models),
            "memory_bytes": self.memory,
            "flags": public_arguments(list(self.flags)),
            "workload": str(self.settings.workload),
            "seed": self.settings.seed,
            "goals": self.settings.goals.limits if self.settings.goals else None,
        }

    def servers(self) -> dict[Served, list[Variant]]:
        """Rows by the model and policy of the server they need."""
        grouped: dict[Served, list[Variant]] = {}
        for variant in self.variants:
            served = (variant.model or self.models[0], variant.server)
            grouped.setdefault(served, []).append(variant)
        return grouped

    def server_name(self, served: Served) -> str:
        """What a server is called in messages, and its log."""
        policy = served[1] or STOCK
        if len(self.models) == 1:
            return policy
        return f"{short_names(self.models)[served[0]]}: {policy}"

    def folder(self, out: Path, variant: Variant, arrivals: Arrivals) -> Path:
        """Where a run is kept."""
        labels = [v.label for v in self.variants]
        name = safe_names(labels)[self.variants.index(variant)]
        loads = safe_names([str(a) for a in self.arrivals])
        return out / f"{name}@{loads[self.arrivals.index(arrivals)]}"

    def arguments(self, served: Served) -> list[str]:
        """What follows ``kvthrift serve``."""
        model, policy = served
        chosen = ["--cache-policy", policy] if policy else []
        memory = ["--kv-cache-memory-bytes", str(self.memory)]
        return [model, *chosen, *memory, "--disable-uvicorn-access-log", *self.flags]


def run_comparison(comparison: Comparison, out: Path) -> int:
    """Run what is not there yet, print the table, write the report; gives the exit status.

    Raises:
        LoadTestError: ``out`` holds runs of another comparison.

    """
    _check_plan(comparison, out)
    # A terminated run must stop its server too: SystemExit unwinds the context managers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    status = 0
    for served, variants in comparison.servers().items():
        work = [
            (variant, arrivals, comparison.folder(out, variant, arrivals))
            for arrivals in comparison.arrivals
            for variant in variants
        ]
        missing = [w for w in work if not complete(w[2], str(w[1]))]
        for variant, arrivals, _ in work:
            if (variant, arrivals) not in [(v, a) for v, a, _ in missing]:
                console.print(f"{variant.label}, {arrivals}: kept from before", highlight=False)
        if not missing:
            continue
        try:
            code = _serve(comparison, served, missing, out)
        except (ServerError, UnfitError) as error:
            _say(comparison.server_name(served), error)
            code = SOME_FAILED
        status = status or code
        if code in ENDS:
            break
    folders = [
        comparison.folder(out, v, a) for v in comparison.variants for a in comparison.arrivals
    ]
    done = [f for f in folders if (f / SUMMARY).exists()]
    if not done:
        raise LoadTestError("no run was finished", status or SOME_FAILED)
    read = [(f / SUMMARY).read_text(encoding="utf-8") for f in done]
    finish(done, out, [Summary.model_validate_json(text) for text in read])
    return status or (SOME_FAILED if len(done) < len(folders) else 0)


def _check_plan(comparison: Comparison, out: Path) -> None:
    path = out / PLAN
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        if known != comparison.plan:
            differing = [k for k, v in comparison.plan.items() if known.get(k) != v]
            raise LoadTestError(
                f"{out} holds runs with another {', '.join(differing)}; use another --out"
            )
    path.write_text(json.dumps(comparison.plan, indent=2) + "\n", encoding="utf-8")


def _serve(
    comparison: Comparison,
    served: Served,
    work: list[tuple[Variant, Arrivals, Path]],
    out: Path,
) -> int:
    """Start a server, do its runs, stop it."""
    name = comparison.server_name(served)
    log = out / f"server-{safe_name(name)}.log"
    status = 0
    with ExitStack() as stack:
        with waiting(console, f"{name}: starting the server") as note:
            started = running_server(comparison.arguments(served), log, on_wait=note)
            server = stack.enter_context(started)
        for variant, arrivals, folder in work:
            try:
                code = _run(comparison, variant, arrivals, folder, server, out)
            except LoadTestError as error:
                if error.status != NO_SERVER:
                    raise
                _say(variant.label, error)  # of this row: others have servers of their own
                return SOME_FAILED
            status = status or code
            if code in ENDS:
                return code
    return status


def _say(name: str, error: Exception) -> None:
    console.print(f"[red]{escape(f'{name}: {error}')}[/red]", highlight=False, soft_wrap=True)


def _run(
    comparison: Comparison,
    variant: Variant,
    arrivals: Arrivals,
    folder: Path,
    server: Server,
    out: Path,
) -> int:
    method = {"vllm_xargs": {"cache_policy": variant.method}} if variant.method else {}
    # the server takes its key from the environment too
    key = read_key(os.environ.get("VLLM_API_KEY", ""), "VLLM_API_KEY")
    target = find_target(server.url, None, extra=method, timeout=comparison.timeout, api_key=key)
    settings = replace(
        comparison.settings,
        arrivals=arrivals,
        label=variant.label,
        policy=variant.policy,
        pid=server.pid,
    )
    items = None
    if len(comparison.models) > 1:
        with waiting(console, f"{variant.label}: counting tokens"):
            items = shared_items(out / PROMPTS, settings, target)
    folder.mkdir(parents=True, exist_ok=True)
    _, status = run_once(settings, target, folder, items=items)
    return status
