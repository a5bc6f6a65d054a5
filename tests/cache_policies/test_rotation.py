"""The rotation of the rotated codecs, from its definition."""

from __future__ import annotations

import pytest
import torch

from cache_policies.pages.codecs.rotation import block, rotate


def _hadamard(size: int) -> torch.Tensor:
    """Sylvester's construction, orthonormal."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=torch.float64), matrix)
    return matrix / size**0.5


@pytest.mark.parametrize(
    ("head_size", "size"), [(64, 64), (80, 16), (96, 32), (128, 128), (256, 256)]
)
def test_it_is_sylvesters_matrix_in_blocks(head_size: int, size: int) -> None:
    assert block(head_size) == size
    matrix = torch.block_diag(*[_hadamard(size)] * (head_size // size)).float()
    x = torch.randn(3, 5, head_size)
    torch.testing.assert_close(rotate(x), x @ matrix)
    torch.testing.assert_close(rotate(rotate(x)), x)


def test_products_stay_and_an_outlier_spreads() -> None:
    query, key = torch.randn(2, 10, 64)
    key[:, 5] += 100
    torch.testing.assert_close((rotate(query) * rotate(key)).sum(-1), (query * key).sum(-1))
    assert rotate(key).abs().amax(-1).max() < 0.2 * key.abs().amax(-1).max()
