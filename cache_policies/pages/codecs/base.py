"""The contract of a codec: how a stored token is encoded in a page."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

import torch

from cache_policies.errors import PolicyError
from cache_policies.pages.codecs.packing import LANES

if TYPE_CHECKING:
    from cache_policies.pages.field import Field

HEAD_SIZES = (64, 80, 96, 128, 256)
MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAGE_STEP = 32  # tokens; the packed layouts work on spans of 32

Views = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Codec(ABC):
    """How stored tokens are encoded. Subclasses are frozen data classes of parameters."""

    name: ClassVar[str]
    keeps: ClassVar[str]
    loses: ClassVar[str]
    QUANTIZES: ClassVar[bool] = True
    ROTATES: ClassVar[bool] = False  # ``turned`` is ``rotation.rotate``

    @property
    def residual(self) -> int:
        """Recent tokens kept in 16 bit until they are absorbed together; 0: none."""
        return 0

    @property
    def groups_tokens(self) -> bool:
        """Whether tokens share scales, so that none is written alone."""
        return False

    @property
    def takes_key_offset(self) -> bool:
        """Whether a constant taken from all keys makes them easier to encode."""
        return False

    @property
    def divisor(self) -> int:
        """Quantization group that must divide head size and page; 1: no groups."""
        return 1

    def __str__(self) -> str:
        shown = [f"{f.name}={getattr(self, f.name)}" for f in fields(self)]
        return f"{self.name}({','.join(shown)})" if shown else self.name

    def check(self, head_size: int, page_tokens: int, model_dtype: torch.dtype) -> None:
        """Refuse shapes the codec cannot store.

        Raises:
            PolicyError: naming the allowed head sizes, dtypes, page sizes or groups.

        """
        if head_size not in HEAD_SIZES:
            raise PolicyError(f"{self}: head size {head_size} is not one of {HEAD_SIZES}")
        if model_dtype not in MODEL_DTYPES:
            raise PolicyError(f"{self}: model dtype {model_dtype} is not one of {MODEL_DTYPES}")
        if page_tokens % PAGE_STEP:
            raise PolicyError(f"{self}: block size {page_tokens} is not a multiple of {PAGE_STEP}")
        if head_size % self.divisor:
            allowed = [g for g in (16, 32, 64, 128) if head_size % g == 0]
            raise PolicyError(
                f"{self}: group {self.divisor} does not divide head size {head_size}; "
                f"groups that do: {allowed}"
            )
        if self.residual and page_tokens % self.residual:
            raise PolicyError(
                f"{self}: residual {self.residual} does not divide the block size {page_tokens}"
            )

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        """What is attended to and written instead of rows ``x`` ``[..., head_size]`` float32.

        Orthonormal and its own inverse, so that products of rows do not change.
        """
        return x

    @abstractmethod
    def fields(
        self, head_size: int, page_tokens: int, model_dtype: torch.dtype, packed: str = LANES
    ) -> tuple[Field, ...]:
        """Declare the fields of a page for one KV head.

        Args:
            head_size: channels of one KV head.
            page_tokens: tokens of a page.
            model_dtype: dtype of the keys and values the model produces.
            packed: how codes below a byte lie: ``packing.LANES`` or ``packing.PLANES``.

        """

    @abstractmethod
    def write(self, views: Views, start: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Encode tokens into page positions ``start ..``.

        Args:
            views: typed views of one page, from ``PageLayout.views``.
            start: first position; a multiple of ``residual`` where there is a ring.
            key: ``[num_kv_heads, num_tokens, head_size]`` float32, turned.
            value: same shape as ``key``, turned.

        """

    @abstractmethod
    def read(self, views: Views, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode the first ``count`` tokens of a page.

        Returns:
            key and value, each ``[num_kv_heads, count, head_size]`` float32, turned.

        """
