"""Model names that carry a method: aliases, and NAME@METHOD."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cache_policies.errors import PolicyError
from cache_policies.policy import parse_method
from cache_policies.policy.policy import method_names

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

LONGEST = 4096  # letters of a name with a method
_ALIAS = re.compile(r"([A-Za-z0-9._/-]+)=(.+)")


@dataclass
class ModelNames:
    """Names that requests may use.

    Attributes:
        served: of the base model; the first is the one answers show.
        aliases: further names, each standing for a method of the base model.
        adapters: vLLM's LoRA adapters by name; they come and go.
        any_base: whether vLLM takes names it does not list: of adapters it looks up on demand, or
            all (``VLLM_SKIP_MODEL_NAME_VALIDATION``).

    """

    served: list[str] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    adapters: Mapping[str, Any] = field(default_factory=dict)
    any_base: bool = False

    @property
    def first(self) -> str:
        """The first served name."""
        return self.served[0] if self.served else ""

    def resolve(self, name: str) -> tuple[str, str] | None:
        """Model and method of an alias or NAME@METHOD; None: a plain name, or none of ours.

        Names may hold an ``@`` themselves; the longest that is known is taken.

        Raises:
            PolicyError: a method behind an alias, which has one; more letters than ``LONGEST``.

        """
        if name in self.served or name in self.adapters:
            return None
        if name in self.aliases:
            return self.first, self.aliases[name]
        if "@" in name and len(name) > LONGEST:
            raise PolicyError(
                f"the model name has {len(name)} letters; with a method at most {LONGEST} are taken"
            )
        for at in reversed([i for i, letter in enumerate(name) if letter == "@"]):
            base, method = name[:at], name[at + 1 :]
            if base in self.served or base in self.adapters:
                return base, method
            if base in self.aliases:
                raise PolicyError(
                    f"the policy is given twice: {base!r} stands for {self.aliases[base]}, and "
                    f"{method!r} follows it"
                )
            if self.any_base and base and _begins_as_method(method):
                return base, method
        return None


def _begins_as_method(text: str) -> bool:
    return text.partition("(")[0].strip() in method_names()


def parse_aliases(texts: list[str], names: Iterable[str]) -> dict[str, str]:
    """Read ``fast=snapkv(budget=512)``.

    Args:
        texts: as given on the command line.
        names: that are taken, of the model and of adapters.

    Raises:
        PolicyError: bad spelling, a name that is taken, or a bad method.

    """
    taken = set(names)
    found: dict[str, str] = {}
    for text in texts:
        match = _ALIAS.fullmatch(text)
        if not match:
            raise PolicyError(
                f"--policy-alias {text!r} is not NAME=METHOD, NAME of letters, digits and ._/-"
            )
        if match[1] in taken or match[1] in found:
            raise PolicyError(f"--policy-alias {text!r}: {match[1]!r} is a model name already")
        found[match[1]] = str(parse_method(match[2]))
    return found
