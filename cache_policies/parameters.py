"""Parameters of codecs, retention and retrieval methods: the part of the grammar they share."""

from __future__ import annotations

import re
from dataclasses import MISSING, Field, fields
from typing import Any

from cache_policies.errors import PolicyError

_PARAMETER = re.compile(r"\s*([a-z_]+)\s*=\s*([a-z0-9.-]+)\s*")
_KINDS: dict[type, str] = {int: "whole number", float: "number", str: "word"}

LARGEST = 2**31 - 1  # counts of tokens; a request could end the engine with more

Value = int | float | str


def parameters(cls: type[Any], fixed: dict[str, Any] | None = None) -> dict[str, Value]:
    """Parameters a user may set, with their defaults.

    Args:
        cls: a data class whose fields all have defaults.
        fixed: fields that the name decides, as ``k_bits`` in ``kivi-4bit``.

    """
    return {f.name: _default(f) for f in fields(cls) if f.name not in (fixed or {})}


def _default(field: Field[Any]) -> Value:
    assert field.default is not MISSING, f"parameter {field.name} needs a default"
    return field.default


def read_arguments(name: str, text: str | None, allowed: dict[str, Value]) -> dict[str, Value]:
    """Parse ``key=value, ...`` into values of the types of the defaults.

    Raises:
        PolicyError: unknown or repeated key, or a value of another type or above ``LARGEST``; names
            what is allowed.

    """
    given: dict[str, Value] = {}
    for item in text.split(",") if text and text.strip() else []:
        match = _PARAMETER.fullmatch(item)
        if not match:
            raise PolicyError(f"parameter {item.strip()!r} is not key=value")
        key = match[1]
        if key not in allowed:
            listed = ", ".join(f"{k}={v}" for k, v in allowed.items()) or "none"
            raise PolicyError(f"{name} has no parameter {key!r}; it has: {listed}")
        if key in given:
            raise PolicyError(f"parameter {key!r} is given twice")
        kind = type(allowed[key])
        try:
            given[key] = kind(match[2])
        except ValueError:
            raise PolicyError(f"parameter {item.strip()!r} is not key={_KINDS[kind]}") from None
        value = given[key]
        if isinstance(value, int | float) and not abs(value) <= LARGEST:
            raise PolicyError(f"parameter {item.strip()!r} is not a number of at most {LARGEST}")
    return given


def shown(name: str, instance: object, allowed: dict[str, Value]) -> str:
    """``name(key=value,...)`` with the values that differ from the defaults."""
    different = [
        f"{key}={getattr(instance, key)}"
        for key, default in allowed.items()
        if getattr(instance, key) != default
    ]
    return f"{name}({','.join(different)})" if different else name
