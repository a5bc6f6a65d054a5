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
from loadtest.commands.run import console, finish, run_once, safe_name, safe_names
from loadtest.commands.session import Settings, complete
from loadtest.errors import SOME_FAILED, LoadTestError
from loadtest.files import SUMMARY
from loadtest.hide import public_arguments, read_key
from loadtest.measuring.summary import Summary
from loadtest.sending.client import find_target

if TYPE_CHECKING:
    from pathlib import Path

    from loadtest.commands.process import Server
    from loadtest.sending.arrivals import Arrivals

STOCK = "stock vLLM"
PLAN = "comparison.json"
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class Variant:
    """A row: a server's policy and what its requests ask for.

    Attributes:
        label: the policy as a user writes it, or ``stock vLLM``.
        server: the server's policy, a codec; None: vLLM's own cache.
        method: what each request asks for; None on a server without policy.

    """

    label: str
    server: str | None
    method: str | None

    @classmethod
    def of(cls, text: str) -> Variant:
        """A row from a policy string.

        Raises:
            PolicyError: not a policy.

        """
        policy = parse(text)
        return cls(str(policy), policy.codec_string, str(policy.method))


@dataclass(frozen=True)
class Comparison:
    """What is compared."""

    model: str
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
    ) -> Comparison:
        """Check everything before a server is started.

        Raises:
            LoadTestError: nothing to compare, a bad policy or memory.

        """
        if any(flag.partition("=")[0] == "--api-key" for flag in flags):
            raise LoadTestError(
                "--api-key would show the key to everybody on this machine; set VLLM_API_KEY, or "
                "nothing: the servers listen on loopback only"
            )
        number, unit = memory[:-1], memory[-1:].upper()
        if unit not in UNITS or not number.isdigit():
            raise LoadTestError(f"--memory {memory!r}: a whole number followed by K, M or G")
        try:
            rows = [Variant.of(text) for text in policies]
        except PolicyError as error:
            raise LoadTestError(str(error)) from None
        if stock:
            rows.insert(0, Variant(STOCK, None, None))
        if not rows:
            raise LoadTestError("nothing to compare: give --policy, or --stock")
        twice = [str(a) for a, n in Counter(map(str, arrivals)).items() if n > 1]
        if twice:
            raise LoadTestError(f"--arrivals {twice[0]} is given twice")
        variants = tuple(dict.fromkeys(rows))
        bytes_ = int(number) * UNITS[unit]
        return cls(model, variants, bytes_, tuple(flags), settings, tuple(arrivals), timeout)

    @property
    def plan(self) -> dict[str, Any]:
        """What must be the same for runs to be comparable."""
        return {
            "model": self.model,
            "memory_bytes": self.memory,
            "flags": public_arguments(list(self.flags)),
            "workload": str(self.settings.workload),
            "seed": self.settings.seed,
            "goals": self.settings.goals.limits if self.settings.goals else None,
        }

    def servers(self) -> dict[str | None, list[Variant]]:
        """Rows by the server they need."""
        grouped: dict[str | None, list[Variant]] = {}
        for variant in self.variants:
            grouped.setdefault(variant.server, []).append(variant)
        return grouped

    def folder(self, out: Path, variant: Variant, arrivals: Arrivals) -> Path:
        """Where a run is kept."""
        labels = [v.label for v in self.variants]
        name = safe_names(labels)[self.variants.index(variant)]
        loads = safe_names([str(a) for a in self.arrivals])
        load = loads[self.arrivals.index(arrivals)]
        return out / (name if len(self.arrivals) == 1 else f"{name}@{load}")

    def arguments(self, policy: str | None) -> list[str]:
        """What follows ``kvthrift serve``."""
        chosen = ["--cache-policy", policy] if policy else []
        memory = ["--kv-cache-memory-bytes", str(self.memory)]
        return [self.model, *chosen, *memory, "--disable-uvicorn-access-log", *self.flags]


def run_comparison(comparison: Comparison, out: Path) -> int:
    """Run what is not there yet, print the table, write the report; gives the exit status.

    Raises:
        LoadTestError: ``out`` holds runs of another comparison.

    """
    _check_plan(comparison, out)
    # A terminated run must stop its server too: SystemExit unwinds the context managers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    status = 0
    for policy, variants in comparison.servers().items():
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
            code = _serve(comparison, policy, missing, out)
        except ServerError as error:
            text = escape(f"{policy or STOCK}: {error}")
            console.print(f"[red]{text}[/red]", highlight=False, soft_wrap=True)
            code = SOME_FAILED
        status = status or code
        if code > SOME_FAILED:
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
    policy: str | None,
    work: list[tuple[Variant, Arrivals, Path]],
    out: Path,
) -> int:
    """Start a server, do its runs, stop it."""
    name = policy or STOCK
    log = out / f"server-{safe_name(name)}.log"
    status = 0
    with ExitStack() as stack:
        with waiting(console, f"{name}: starting the server") as note:
            started = running_server(comparison.arguments(policy), log, on_wait=note)
            server = stack.enter_context(started)
        for variant, arrivals, folder in work:
            code = _run(comparison, variant, arrivals, folder, server)
            status = status or code
            if code > SOME_FAILED:
                return code
    return status


def _run(
    comparison: Comparison, variant: Variant, arrivals: Arrivals, folder: Path, server: Server
) -> int:
    method = {"vllm_xargs": {"cache_policy": variant.method}} if variant.method else {}
    # the server takes its key from the environment too
    key = read_key(os.environ.get("VLLM_API_KEY", ""), "VLLM_API_KEY")
    target = find_target(server.url, None, extra=method, timeout=comparison.timeout, api_key=key)
    folder.mkdir(parents=True, exist_ok=True)
    settings = replace(
        comparison.settings,
        arrivals=arrivals,
        label=variant.label,
        policy=variant.label,
        pid=server.pid,
    )
    _, status = run_once(settings, target, folder)
    return status
