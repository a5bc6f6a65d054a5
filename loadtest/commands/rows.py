"""Which policies belong to which model on the command line of ``kvthrift compare``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from typer.core import TyperCommand

ARGUMENTS = "kvthrift.arguments"


class Ordered(TyperCommand):
    """A command that also keeps its arguments as they stood: options lose their order."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)


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
            policy = value if equals and name == "--policy" else next(left, "")
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
