"""The highest rate that meets the goals."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING

import typer

from loadtest.commands.run import console, finish
from loadtest.errors import TOO_MANY_ERRORS, LoadTestError
from loadtest.measuring.goodput import highest_rate

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from loadtest.commands.session import Settings
    from loadtest.measuring.summary import Summary
    from loadtest.sending.client import Target

    RunOnce = Callable[[Settings, Target, Path], tuple[Summary, int]]


def search(
    settings: Settings, target: Target, text: str, wanted: float, out: Path, run: RunOnce
) -> None:
    """Runs at rates until the highest that meets the goals is known."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)", text)
    if not match or not 0 < float(match[1]) < float(match[2]):
        raise LoadTestError(f"--search {text!r}: write LOW-HIGH in requests per second, e.g. 0.1-4")
    if settings.goals is None:
        raise LoadTestError("--search needs --goodput")
    if "rate" not in type(settings.arrivals).model_fields:
        raise LoadTestError("--search needs --arrivals poisson, constant or gamma")
    trials: list[tuple[float, Summary]] = []

    def attained(rate: float) -> float:
        # other prompts each time: known ones would be found in a prefix cache
        one = replace(
            settings,
            arrivals=settings.arrivals.model_copy(update={"rate": rate}),
            seed=settings.seed + len(trials),
            label=f"{settings.label} {rate:.3g}/s",
        )
        folder = out / f"rate-{rate:.6g}"
        folder.mkdir(parents=True, exist_ok=True)
        summary, status = run(one, target, folder)
        if summary.stopped and status != TOO_MANY_ERRORS:
            raise LoadTestError(f"the search ended: {summary.stopped}", status)
        if summary.goodput and summary.goodput.unknown == summary.requests.planned:
            raise LoadTestError(
                "--search: no request can be judged by the goals, since all tokens of an answer "
                "come at the same time; leave tpot out of --goodput"
            )
        trials.append((rate, summary))
        return summary.goodput.share if summary.goodput else 0.0

    best = highest_rate(attained, float(match[1]), float(match[2]), wanted)
    found = {
        "goals": settings.goals.limits,
        "attainment": wanted,
        "highest_rate": best,
        "trials": [{"rate": r, "share": s.goodput.share if s.goodput else None} for r, s in trials],
    }
    (out / "search.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    trials.sort(key=lambda trial: trial[0])
    finish([out / f"rate-{r:.6g}" for r, _ in trials], out, [s for _, s in trials])
    if best is None:
        console.print(f"not even {match[1]} requests/s meets the goals")
        raise typer.Exit(1)
    console.print(f"highest rate that meets the goals: {best:.3g} requests/s")
