"""All codecs by the name a user writes. ``kivi-4bit`` and the like are presets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from cache_policies.pages.codecs.flexgen import FlexGen
from cache_policies.pages.codecs.int8 import Int8
from cache_policies.pages.codecs.kivi import Kivi
from cache_policies.pages.codecs.plain import Bf16, Fp16, Raw
from cache_policies.pages.codecs.rotated import Rotated

if TYPE_CHECKING:
    from cache_policies.pages.codecs.base import Codec


@dataclass(frozen=True)
class CodecEntry:
    """A name in the policy grammar.

    Attributes:
        cls: the codec class.
        fixed: parameters the name decides, as in ``kivi-4bit``.

    """

    cls: type[Codec]
    fixed: tuple[tuple[str, int], ...] = ()

    def build(self, **parameters: Any) -> Codec:
        """Make the codec; ``parameters`` must be names of fields that are not fixed."""
        return partial(self.cls, **dict(self.fixed))(**parameters)


CODECS: dict[str, CodecEntry] = {
    "raw": CodecEntry(Raw),
    "fp16": CodecEntry(Fp16),
    "bf16": CodecEntry(Bf16),
    "int8": CodecEntry(Int8),
    "flexgen-4bit": CodecEntry(FlexGen),
    "kivi-4bit": CodecEntry(Kivi, (("k_bits", 4), ("v_bits", 4))),
    "kivi-2bit": CodecEntry(Kivi, (("k_bits", 2), ("v_bits", 2))),
    "kivi": CodecEntry(Kivi),
    "rotated-4bit": CodecEntry(Rotated, (("k_bits", 4), ("v_bits", 4))),
    "rotated-3bit": CodecEntry(Rotated, (("k_bits", 3), ("v_bits", 3))),
    "rotated": CodecEntry(Rotated),
}
