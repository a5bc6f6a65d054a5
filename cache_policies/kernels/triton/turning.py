"""What a layer's rows are turned into before they are stored or attended to, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cache_policies.kernels.triton.device.turn import turn
from cache_policies.kernels.triton.launch import launch

if TYPE_CHECKING:
    from cache_policies.kernels.triton.page import Page

ROWS = 16  # of a program


class Turning:
    """The rotation of the codec, and the layer's key offset; rows are ``[n, heads, head_size]``.

    Args:
        page: the layer's page.
        offset: ``[num_kv_heads, head_size]`` float32, taken from every key; None: there is none.

    """

    def __init__(self, page: Page, offset: torch.Tensor | None) -> None:
        self.page, self._offset = page, offset

    def _offset_beside(self, x: torch.Tensor) -> torch.Tensor | None:
        """The offset on the device of ``x``, copied once."""
        if self._offset is not None:
            self._offset = self._offset.detach().to(x.device)
        return self._offset

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        """Queries or values as attention takes them: float32 where they are rotated."""
        return self._turned(x, None) if self.page.rotation else x

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """Keys as they are stored: float32 where anything is done to them."""
        offset = self._offset_beside(x)
        return x if offset is None and not self.page.rotation else self._turned(x, offset)

    def room(self, output: torch.Tensor) -> torch.Tensor:
        """Where attention writes what ``rotate_back`` turns into ``output``."""
        return torch.empty_like(output, dtype=torch.float32) if self.page.rotation else output

    def rotate_back(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """The reverse of ``rotated``, into ``out``, which may be ``x``."""
        if self.page.rotation:
            self._launch(x, out, None, back=True)

    def keys_back(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """The reverse of ``keys``, into ``out``, which may be ``x``."""
        offset = self._offset_beside(x)
        if self.page.rotation or offset is not None:
            self._launch(x, out, offset, back=True)

    def _turned(self, x: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
        out = torch.empty_like(x, dtype=torch.float32)
        self._launch(x, out, offset, back=False)
        return out

    def _launch(
        self, x: torch.Tensor, out: torch.Tensor, offset: torch.Tensor | None, *, back: bool
    ) -> None:
        rows, heads = x.shape[:2]
        taken = x if offset is None else offset
        launch(
            turn, (-(-rows // ROWS), heads), x, out, taken, rows,
            x.stride(0), x.stride(1), out.stride(0), out.stride(1),
            PAGE=self.page, BLOCK=ROWS, OFFSET=offset is not None, BACK=back, fusion=False,
        )  # fmt: skip
