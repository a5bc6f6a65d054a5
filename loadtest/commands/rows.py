"""Which policies belong to which model on the command line of ``kvthrift compare``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from typer.core import TyperCommand

ARGUMENTS = "kvthrift.arguments"
# vLLM's short flags of several letters, which would be taken for as many flags of one letter.
SHORT = {
    "-ac": "--attention-config", "-asc": "--api-server-count", "-cc": "--compilation-config",
    "-dc": "--diffusion-config", "-dcp": "--decode-context-parallel-size",
    "-dp": "--data-parallel-size", "-dpa": "--data-parallel-address",
    "-dpb": "--data-parallel-backend", "-dpe": "--data-parallel-external-lb",
    "-dph": "--data-parallel-hybrid-lb", "-dpl": "--data-parallel-size-local",
    "-dpm": "--data-parallel-multi-port-external-lb", "-dpn": "--data-parallel-rank",
    "-dpp": "--data-parallel-rpc-port", "-dpr": "--data-parallel-start-rank",
    "-ep": "--enable-expert-parallel", "-pcp": "--prefill-context-parallel-size",
    "-pp": "--pipeline-parallel-size", "-sc": "--speculative-config",
    "-tp": "--tensor-parallel-size",
}  # fmt: skip


class Ordered(TyperCommand):
    """A command that also keeps its arguments as they stood: options lose their order."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spelled = [_spelled_out(text) for text in args]
        ctx.meta[ARGUMENTS] = list(spelled)
        return super().parse_args(ctx, spelled)


def _spelled_out(text: str) -> str:
    name, equals, value = text.partition("=")
    return SHORT.get(name, name) + equals + value


@dataclass
class Asked:
    """A model and what it is to be served with.

    Attributes:
        model: as for ``kvthrift serve``.
        policies: as written.
        stock: whether vLLM's own cache is a row too.

    """

    model: str
    policies: list[str] = field(default_factory=list)
    stock: bool = False


def by_model(first: str | None, arguments: list[str]) -> list[Asked]:
    """Split a command line at its models.

    Args:
        first: the model that stands without ``--model``.
        arguments: the command line. ``--policy`` and ``--stock`` belong to the model before them;
            before the first model they belong to all.

    """
    everybody = Asked("")
    found = [Asked(first)] if first else []
    left = iter(arguments)
    for text in left:
        name, equals, value = text.partition("=")
        if text in ("--stock", "--no-stock"):
            (found[-1] if found else everybody).stock = text == "--stock"
        elif name == "--model":
            found.append(Asked(value if equals else next(left, "")))
        elif name in ("--policy", "-p"):
            policy = value if equals else next(left, "")
            (found[-1] if found else everybody).policies.append(policy)
        elif text.startswith("-p") and not text.startswith("--"):
            (found[-1] if found else everybody).policies.append(text[2:])
    for one in found:
        one.policies = everybody.policies + one.policies
        one.stock = one.stock or everybody.stock
    return found


def options(asked: list[Asked]) -> dict[str, Any]:
    """What ``Comparison.of`` takes."""
    first, *others = asked
    return {
        "model": first.model, "policies": first.policies, "stock": first.stock, "others": others,
    }  # fmt: skip
