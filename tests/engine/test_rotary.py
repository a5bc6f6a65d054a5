"""Rotary embedding is that of the model's own modules, in every form that is not refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.engine.conftest import Program

pytestmark = pytest.mark.engine
ORIGINAL = {"original_max_position_embeddings": 512, "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FACTORS = {"short_factor": [1.0] * 32, "long_factor": [1.0 + i / 8 for i in range(32)]}


def _module(kind: str, neox: bool = True, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": kind, "rope_theta": 1e4, **more}
    return {
        "head_size": 64, "max_position": 2048, "is_neox_style": neox, "rope_parameters": rope
    }  # fmt: skip


MODULES = {
    "plain": _module("default"),
    "GPT-J": _module("default", neox=False, partial_rotary_factor=0.5),
    "partial": _module("default", partial_rotary_factor=0.25),
    "linear": _module("linear", factor=2.0),
    "dynamic": _module("dynamic", factor=2.0),
    "yarn": _module("yarn", **ORIGINAL),
    "yarn, attention factor": _module("yarn", attention_factor=1.5, **ORIGINAL),
    "longrope": _module("longrope", **FACTORS, **ORIGINAL),
}


def test_every_form_turns_as_the_models_module_does(program: Program, tiny: str) -> None:
    found = program("rotary", model=tiny, scaling={**LLAMA3, **ORIGINAL}, modules=MODULES)
    assert found["answers"] == [4, 4]
    assert found["same"] == [True, True]
    assert max(found["layers"]) < 1e-5
    assert set(found["modules"]) == set(MODULES)
    assert max(found["modules"].values()) < 1e-5, found["modules"]
