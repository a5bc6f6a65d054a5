"""Rotary position embedding, for methods that must turn keys or queries to other positions.

The angles come from the table that the model itself turns by, so that every scaling of
frequencies (Llama 3's, YaRN, linear, dynamic NTK, LongRoPE) is right, and its attention factor too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cache_policies.errors import PolicyError

NEEDS = "expected-attention, compactor and positions=cache"
# Forms that turn a head by one table, indexed by the position.
FORMS = ("default", "llama3", "linear", "ntk", "dynamic", "yarn", "longrope")
# Model types that have a rotary module beside layers that they do not turn by it.
NOT_ALWAYS = (
    "afmoe", "cohere2", "cohere2_moe", "exaone4", "exaone_moe", "llama4_text", "olmo_hybrid",
    "step3p5", "zamba2",
)  # fmt: skip
NEVER = ("jamba", "nemotron_h")  # whatever their configurations say of it


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of one layer.

    Attributes:
        table: ``[positions, r]``: r/2 cosines, then r/2 sines, both times the attention factor.
            The first r channels of a head are turned, in pairs; the others are left alone.
        head_size: channels of a head.
        interleaved: pairs are neighbouring channels (GPT-J), not a channel and that r/2 after it.

    """

    table: torch.Tensor
    head_size: int
    interleaved: bool = False

    @classmethod
    def none(cls, head_size: int, device: torch.device | None = None) -> Rope:
        """Of a layer without rotary embedding: nothing turns."""
        return cls(torch.zeros(1, 0, device=device, dtype=torch.float32), head_size)

    def rotate(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """What the model does to ``x`` ``[..., n, head_size]`` at positions ``[n]``."""
        return self._turn(x, *self._at(position))

    def undo(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Bring ``x`` ``[..., n, head_size]`` back from positions ``[n]``, factor included."""
        cos, sin = self._at(position)
        square = cos.square() + sin.square()
        return self._turn(x, cos / square, -sin / square)

    def turn_on(self, x: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
        """Turn rotated ``x`` ``[..., n, head_size]`` on by ``distance`` ``[n]`` positions."""
        return self._turn(x, *_unit(*self._at(distance)))

    def mean_rotation(self, first: int, end: int) -> torch.Tensor:
        """The matrix ``[d, d]`` of ``rotate``, averaged over positions ``first .. end - 1``."""
        cos, sin = (x.mean(0) for x in self._at(torch.arange(first, end, device=self.table.device)))
        matrix = torch.eye(self.head_size, device=cos.device, dtype=cos.dtype)
        one, other = self._pairs(torch.arange(self.head_size, device=cos.device))
        matrix[one, one] = matrix[other, other] = cos
        matrix[one, other], matrix[other, one] = -sin, sin
        return matrix

    def _at(self, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines ``[n, r/2]``; what lies beyond the table is turned on from its end."""
        last = self.table.shape[0] - 1
        cos, sin = self.table[position.clamp(max=last)].float().chunk(2, -1)
        beyond = self.table[(position - last).clamp(0, last)].float().chunk(2, -1)
        more_cos, more_sin = _unit(*beyond)
        return cos * more_cos - sin * more_sin, sin * more_cos + cos * more_sin

    def _pairs(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The turned channels of the last axis, as firsts and seconds of pairs."""
        turned = x[..., : self.table.shape[1]]
        if self.interleaved:
            return turned[..., ::2], turned[..., 1::2]
        first, second = turned.chunk(2, -1)
        return first, second

    def _turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = self._pairs(x)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        turned = first * cos - second * sin, second * cos + first * sin
        both = torch.stack(turned, -1).flatten(-2) if self.interleaved else torch.cat(turned, -1)
        return torch.cat([both, x[..., self.table.shape[1] :]], -1)


def _unit(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same angles without the attention factor."""
    length = torch.hypot(cos, sin)
    return cos / length, sin / length


def refuse_rotary(hf_config: Any) -> None:
    """Refuse models whose rotary embedding is of a form that cannot be undone here.

    Raises:
        PolicyError: naming the form.

    """
    model, given = getattr(hf_config, "model_type", ""), rotary_parameters(hf_config)
    kind = given.get("rope_type", "default")
    reason = None
    chosen = getattr(hf_config, "position_embedding_type", None)  # Granite 4's
    without = model in NEVER or (model == "granitemoehybrid" and chosen != "rope")
    if given.get("rope_theta") is None or without:
        reason = "no rotary embedding"
    elif kind not in FORMS:
        reason = f"rope_type={kind!r} (allowed: {', '.join(FORMS)})"
    elif "mrope_section" in given:
        reason = "rotary embedding over time, height and width (mrope_section)"
    elif given.get("use_fope"):
        reason = "Fourier position embedding (use_fope)"
    elif model in NOT_ALWAYS or getattr(hf_config, "no_rope_layers", None):
        reason = "layers without rotary embedding among others"
    if reason:
        raise PolicyError(
            f"{NEEDS} need a rotary embedding that turns every layer's keys by their position; "
            f"the model {model!r} has {reason}"
        )


def rotary_parameters(hf_config: Any) -> dict[str, Any]:
    """A model's ``rope_parameters``; those of full attention where layers differ."""
    given = getattr(hf_config, "rope_parameters", None) or {}
    nested = given.get("full_attention", given)
    return dict(nested) if isinstance(nested, dict) else {}
