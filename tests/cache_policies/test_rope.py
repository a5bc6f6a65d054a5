"""Rotary embedding by a table, against rotation matrices made from angles."""

from __future__ import annotations

import pytest
import torch

from cache_policies.errors import PolicyError
from cache_policies.retention.rope import Rope, refuse_rotary

SIZE, FACTOR = 64, 1.25  # an attention factor as YaRN's
FREQUENCY = 500.0 ** (-torch.arange(16).double() / 16)


def _rope(turned: int, interleaved: bool, positions: int = 400) -> Rope:
    angle = torch.arange(positions).double()[:, None] * FREQUENCY[: turned // 2]
    table = torch.cat([angle.cos(), angle.sin()], 1) * FACTOR
    return Rope(table.float(), SIZE, interleaved)


def _matrix(turned: int, interleaved: bool, position: float) -> torch.Tensor:
    matrix = torch.eye(SIZE, dtype=torch.float64)
    for i in range(turned // 2):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + turned // 2)
        angle = position * FREQUENCY[i]
        matrix[a, a] = matrix[b, b] = angle.cos() * FACTOR
        matrix[b, a] = angle.sin() * FACTOR
        matrix[a, b] = -matrix[b, a]
    return matrix


@pytest.mark.parametrize("turned", [32, 16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_it_turns_as_the_matrices_do(turned: int, interleaved: bool) -> None:
    rope = _rope(turned, interleaved)
    position = torch.tensor([0, 1, 77, 399, 400, 700])  # the last two lie beyond the table
    plain = torch.randn(3, 6, SIZE)
    want = torch.stack([_matrix(turned, interleaved, float(p)) for p in position]).float()
    turned_on = rope.rotate(plain, position)
    torch.testing.assert_close(turned_on, torch.einsum("nij,hnj->hni", want, plain))
    torch.testing.assert_close(rope.undo(turned_on, position), plain)
    mean = torch.stack([_matrix(turned, interleaved, p) for p in range(390, 450)]).mean(0)
    torch.testing.assert_close(rope.mean_rotation(390, 450), mean.float())


@pytest.mark.parametrize("interleaved", [False, True])
def test_turning_on_equals_another_position(interleaved: bool) -> None:
    rope, plain = _rope(32, interleaved), torch.randn(2, 3, SIZE)
    here, distance = torch.tensor([0, 2, 9]), torch.full((3,), 200)
    moved = rope.turn_on(rope.rotate(plain, here), distance)
    torch.testing.assert_close(moved, rope.rotate(plain, here + 200))


def test_without_rotary_embedding_nothing_turns() -> None:
    x, rope = torch.randn(2, 3, SIZE), Rope.none(SIZE)
    assert torch.equal(rope.undo(x, torch.arange(3)), x)
    assert torch.equal(rope.turn_on(x, torch.arange(3)), x)
    assert torch.equal(rope.mean_rotation(5, 9), torch.eye(SIZE))


class _Config:
    def __init__(self, model_type: str, rope: dict[str, object] | None, **more: object) -> None:
        self.model_type, self.rope_parameters = model_type, rope
        self.__dict__.update(more)


def _of(kind: str, **more: object) -> dict[str, object]:
    return {"rope_type": kind, "rope_theta": 1e4, **more}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (_Config("gpt2", None), "'gpt2' has no rotary embedding"),
        (_Config("x", _of("proportional")), "rope_type='proportional'"),
        (_Config("qwen2_vl_text", _of("default", mrope_section=[1])), "mrope_section"),
        (_Config("olmo", _of("default", use_fope=True)), "use_fope"),
        (_Config("cohere2", _of("default")), "layers without rotary embedding"),
        (_Config("afmoe", _of("default")), "layers without rotary embedding"),
        (_Config("nemotron_h", _of("default")), "has no rotary embedding"),
        (
            _Config("granitemoehybrid", _of("default"), position_embedding_type="nope"),
            "has no rotary embedding",
        ),
        (_Config("granitemoehybrid", _of("default")), "has no rotary embedding"),
        (_Config("smollm3", _of("default"), no_rope_layers=[1, 0]), "layers without rotary"),
    ],
)
def test_other_forms_are_refused_by_name(config: _Config, named: str) -> None:
    with pytest.raises(PolicyError, match=named):
        refuse_rotary(config)


@pytest.mark.parametrize("kind", ["default", "llama3", "linear", "dynamic", "yarn", "longrope"])
def test_forms_of_one_table_are_taken(kind: str) -> None:
    refuse_rotary(_Config("llama", _of(kind)))
    rope = {"position_embedding_type": "rope"}
    refuse_rotary(_Config("granitemoehybrid", _of(kind), **rope))
    refuse_rotary(_Config("gemma3_text", {"full_attention": _of(kind), "sliding_attention": {}}))
