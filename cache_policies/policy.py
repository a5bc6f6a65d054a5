"""The policy string: parse, validate, print back.

Grammar: ``term ['+' term ...]``, a term being ``name`` or ``name(key=value, ...)``.
A policy is a codec, a retention method and a retrieval method (see docs/policies.md); the
axes other than the codec have one member each today, ``all``: every token is kept and read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from cache_policies.codecs import CODECS, CodecEntry
from cache_policies.errors import PolicyError

if TYPE_CHECKING:
    from cache_policies.codecs.base import Codec

_TERM = re.compile(r"\s*([a-z][a-z0-9-]*)\s*(?:\(([^()]*)\))?\s*")
_PARAMETER = re.compile(r"\s*([a-z_]+)\s*=\s*(-?\d+)\s*")


@dataclass(frozen=True)
class Policy:
    """A parsed policy.

    Attributes:
        codec: how a stored token is encoded.
        name: the name the user wrote, e.g. ``kivi-4bit``.

    """

    codec: Codec
    name: str

    def __str__(self) -> str:
        """The canonical string; it parses back to an equal policy."""
        entry = CODECS[self.name]
        shown = [
            f"{name}={getattr(self.codec, name)}"
            for name, default in parameters(entry).items()
            if getattr(self.codec, name) != default
        ]
        return f"{self.name}({','.join(shown)})" if shown else self.name


def parameters(entry: CodecEntry) -> dict[str, int]:
    """Parameters a user may set for a name, with their defaults."""
    fixed = dict(entry.fixed)
    return {f.name: f.default for f in fields(entry.cls) if f.name not in fixed}  # type: ignore[misc]


def parse(text: str) -> Policy:
    """Parse a policy string.

    Raises:
        PolicyError: unknown name or parameter, value out of range, or bad syntax; the message
            names what is allowed.

    """
    if not isinstance(text, str) or not text.strip():
        raise PolicyError(f"cache_policy must be a non-empty string, not {text!r}; {_allowed()}")
    terms = text.split("+")
    if len(terms) > 1:
        raise PolicyError(
            f"cache policy {text!r}: only one codec can be given, and combining with '+' needs "
            f"a retention or retrieval method, none of which exists yet; {_allowed()}"
        )
    match = _TERM.fullmatch(terms[0])
    if not match:
        raise PolicyError(f"cache policy {text!r} is not name or name(key=value,...); {_allowed()}")
    name, arguments = match[1], match[2]
    if name not in CODECS:
        raise PolicyError(f"unknown cache policy {name!r}; {_allowed()}")
    entry = CODECS[name]
    try:
        return Policy(entry.build(**_arguments(name, arguments, parameters(entry))), name)
    except PolicyError as error:
        raise PolicyError(f"cache policy {text!r}: {error}") from None


def _allowed() -> str:
    return "allowed: " + ", ".join(CODECS)


def _arguments(name: str, text: str | None, allowed: dict[str, int]) -> dict[str, int]:
    given: dict[str, int] = {}
    for item in text.split(",") if text and text.strip() else []:
        match = _PARAMETER.fullmatch(item)
        if not match:
            raise PolicyError(f"parameter {item.strip()!r} is not key=whole number")
        key = match[1]
        if key not in allowed:
            listed = ", ".join(f"{k}={v}" for k, v in allowed.items()) or "none"
            raise PolicyError(f"{name} has no parameter {key!r}; it has: {listed}")
        if key in given:
            raise PolicyError(f"parameter {key!r} is given twice")
        given[key] = int(match[2])
    return given
