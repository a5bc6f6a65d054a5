"""The way workloads and arrivals are spelled: ``name(key=value, key=first|second)``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from loadtest.errors import LoadTestError

if TYPE_CHECKING:
    from collections.abc import Mapping

_SPEC = re.compile(r"\s*([a-z0-9_-]+)\s*(?:\((.*)\))?\s*", re.DOTALL)
_ARGUMENT = re.compile(r"\s*([a-z_]+)\s*=\s*(.*?)\s*", re.DOTALL)


class Spec(BaseModel):
    """Something a user spells in one string. Lists are separated by ``|``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    kind: ClassVar[str]
    spell_defaults: ClassVar[bool] = False

    @model_validator(mode="before")
    @classmethod
    def _split_lists(cls, data: dict[str, Any]) -> dict[str, Any]:
        def split(key: str, value: Any) -> Any:
            field = cls.model_fields.get(key)
            is_list = field is not None and get_origin(field.annotation) is tuple
            return value.split("|") if is_list and isinstance(value, str) else value

        return {key: split(key, value) for key, value in data.items()}

    @model_validator(mode="after")
    def _no_value_twice(self) -> Self:
        for key in type(self).model_fields:
            value = getattr(self, key)
            if isinstance(value, tuple) and len(set(value)) < len(value):
                raise ValueError(f"{key} names a value twice")
        return self

    def __str__(self) -> str:
        """Canonical spelling: what differs from the defaults, or everything."""
        shown = ",".join(
            f"{key}={_text(getattr(self, key))}"
            for key, field in type(self).model_fields.items()
            if self.spell_defaults or getattr(self, key) != field.default
        )
        return f"{self.kind}({shown})" if shown else self.kind


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "|".join(map(_text, value))
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


S = TypeVar("S", bound=Spec)


def parse_spec(text: str, kinds: Mapping[str, type[S]], what: str) -> S:
    """Read ``name(key=value,...)``.

    Args:
        text: what the user wrote.
        kinds: what each name makes.
        what: e.g. ``workload``, for messages.

    Raises:
        LoadTestError: unknown name or key, or a bad value; says what is allowed.

    """
    match = _SPEC.fullmatch(text)
    if not match or match[1] not in kinds:
        raise LoadTestError(f"unknown {what} {text!r}; allowed: {', '.join(kinds)}")
    cls = kinds[match[1]]
    given: dict[str, str] = {}
    for item in match[2].split(",") if match[2] and match[2].strip() else []:
        argument = _ARGUMENT.fullmatch(item)
        if not argument or argument[1] not in cls.model_fields:
            allowed = ", ".join(f"{k}={_text(f.default)}" for k, f in cls.model_fields.items())
            raise LoadTestError(f"{what} {match[1]}: {item.strip()!r} is not one of {allowed}")
        if argument[1] in given:
            raise LoadTestError(f"{what} {match[1]}: {argument[1]} is given twice")
        given[argument[1]] = argument[2]
    try:
        return cls(**given)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise LoadTestError(f"{what} {match[1]}: {place or text}: {first['msg']}") from None
