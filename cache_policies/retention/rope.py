"""Rotary position embedding, for methods that must turn keys or queries to other positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cache_policies.errors import PolicyError

# Model types that turn neighbouring channels instead of halves.
INTERLEAVED = ("chatglm", "cohere", "cohere2", "ernie4_5", "glm", "glm4", "gptj")


@dataclass(frozen=True)
class Rope:
    """The plain form: channel i turns with channel i + d/2, by position * theta^(-2i/d).

    Attributes:
        head_size: channels d.
        theta: base of the frequencies; 0: nothing turns, for models without this embedding.

    """

    head_size: int
    theta: float

    @classmethod
    def of(cls, config: Any, head_size: int) -> Rope:
        """Read a model's configuration.

        Raises:
            PolicyError: the model uses another form of rotary embedding, or none.

        """
        given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
        given = given if isinstance(given, dict) else {}
        theta = given.get("rope_theta", getattr(config, "rope_theta", None))
        kind = given.get("rope_type", given.get("type", "default"))
        partial = given.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0))
        model = getattr(config, "model_type", "")
        if theta is None or kind != "default" or partial != 1.0 or model in INTERLEAVED:
            raise PolicyError(
                "expected-attention and positions=cache need plain rotary embedding over the "
                f"whole head, in halves; {model!r} has rope_type={kind!r}, rope_theta={theta}, "
                f"partial_rotary_factor={partial}"
            )
        return cls(head_size, float(theta))

    def _angles(self, position: torch.Tensor) -> torch.Tensor:
        channel = torch.arange(0, self.head_size, 2, dtype=torch.float64)
        frequency = self.theta ** (-channel / self.head_size) if self.theta else channel * 0
        return position.double()[..., None] * frequency

    def rotate(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Turn ``x`` ``[..., n, head_size]`` on by ``position`` ``[n]`` (may be negative)."""
        angle = self._angles(position)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def mean_rotation(self, first: int, end: int) -> torch.Tensor:
        """The rotation matrix ``[d, d]`` averaged over positions ``first .. end - 1``."""
        angle = self._angles(torch.arange(first, end))
        cos, sin = angle.cos().mean(0).float().diag(), angle.sin().mean(0).float().diag()
        return torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)], 0)
