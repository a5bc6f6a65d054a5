"""The author's RWKV files as model folders: sizes from shapes, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig
from typer.testing import CliRunner

from cache_policies.errors import PolicyError
from linear_models.configs import register_configs
from linear_models.convert import config_of, convert
from server.cli import app
from tests.engine.tiny_rwkv import RWKV5, rwkv5_weights
from tests.engine.tiny_rwkv7 import RWKV7, rwkv7_weights

if TYPE_CHECKING:
    from pathlib import Path

VERSIONS = {"rwkv5": (rwkv5_weights, RWKV5), "rwkv7": (rwkv7_weights, RWKV7)}
SIZES = {
    "rwkv5": ("head_size", "attention_hidden_size", "num_attention_heads"),
    "rwkv7": (
        "head_dim", "num_heads", "decay_low_rank_dim", "a_low_rank_dim", "v_low_rank_dim",
        "gate_low_rank_dim", "value_dim", "norm_eps",
    ),
}  # fmt: skip
COMMON = ("architectures", "vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings")


@pytest.mark.parametrize("version", VERSIONS)
def test_sizes_are_those_of_the_published_configuration(version: str, tmp_path: Path) -> None:
    register_configs()
    weights, published = VERSIONS[version]
    made = {name: w.bfloat16() for name, w in weights().items()}
    torch.save(made, tmp_path / "model.pth")
    result = CliRunner().invoke(
        app, ["model", "convert", str(tmp_path / "model.pth"), str(tmp_path / "folder")]
    )
    assert (result.exit_code, result.output.strip()) == (0, str(tmp_path / "folder"))
    found = AutoConfig.from_pretrained(tmp_path / "folder")
    expected = AutoConfig.for_model(**{k: v for k, v in published.items() if k != "auto_map"})
    for name in (*COMMON, *SIZES[version], "intermediate_size"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.dtype == torch.bfloat16
    kept = load_file(tmp_path / "folder" / "model.safetensors")
    assert kept.keys() == made.keys()
    assert all(torch.equal(kept[name], made[name]) for name in made)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_weight_is_looked_for(version: str) -> None:
    weights, _ = VERSIONS[version]
    whole = weights()
    for name in whole:
        if name.startswith("blocks.0.att.v"):
            continue  # RWKV-7's first block needs none
        with pytest.raises(PolicyError):
            config_of({other: w for other, w in whole.items() if other != name})


def test_a_single_block_has_no_mix_of_values() -> None:
    alone = {n: w for n, w in rwkv7_weights().items() if not n.startswith("blocks.1.")}
    assert config_of(alone)["num_hidden_layers"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks.0.att.time_maa_x": torch.zeros(1)}, r"is of RWKV-6; known here are RWKV-5\.2"),
        ({"blocks.0.att.time_decay": torch.zeros(2)}, r"is of RWKV-5\.0 or 5\.1; known here"),
        ({"blocks.0.att.time_decay": torch.zeros(2), "blocks.0.att.time_first": torch.zeros(2),
          "blocks.0.att.ln_x.weight": None}, "is of RWKV-4; known here"),
        ({"blocks.0.att.time_decay": None}, r"has no blocks\.0\.att\.time_decay"),
        ({"ln_out.bias": None}, r"has no ln_out\.bias"),
        ({"blocks.1.att.key.weight": None}, r"has no blocks\.1\.att\.key\.weight"),
        ({"emb.weight": None}, "has no emb.weight"),
        ({"blocks.0.att.r_k": torch.zeros(2, 64), "blocks.0.ffn.s_emb.weight": torch.zeros(1)},
         "DeepEmbed"),
        ({"blocks.0.ffn.key.weight": None}, r"the file has no blocks\.0\.ffn\.key\.weight"),
        ({"blocks.0.att.r_k": torch.zeros(2, 64)}, r"the file has no blocks\.0\.att\.w1"),
        ({"blocks.0.att.r_k": torch.zeros(64)}, r"has blocks\.0\.att\.r_k of shape \[64\]"),
        ({"blocks.0.att.r_k": torch.zeros(2, 64), "blocks.0.att.w1": torch.zeros(128, 32),
          "blocks.0.att.a1": torch.zeros(128, 32)}, r"the file has no blocks\.1\.att\.v1"),
        ({"emb.weight": torch.zeros(5)}, r"has emb\.weight of shape \[5\]"),
        ({"blocks.7.ln1.weight": torch.zeros(5)}, r"the file has no blocks\.2, and so is no RWKV"),
        ({"blocks.x.ln1.weight": torch.zeros(5)}, r"the file has no blocks\.2, and so is no RWKV"),
        ({"_version": 0.7}, "has an entry '_version' that is no weight"),
        ({7: torch.zeros(5)}, "has an entry 7 that is no weight"),
    ],
)  # fmt: skip
def test_other_files_are_refused(changes: dict[Any, Any], message: str, tmp_path: Path) -> None:
    weights = {k: w for k, w in {**rwkv5_weights(), **changes}.items() if w is not None}
    torch.save(weights, tmp_path / "model.pth")
    with pytest.raises(PolicyError, match=message):
        convert(tmp_path / "model.pth", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_what_is_no_file_of_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_text("no weights")
    with pytest.raises(PolicyError, match=r"model\.pth cannot be read as weights"):
        convert(tmp_path / "model.pth", tmp_path / "folder")
    with pytest.raises(PolicyError, match=r"nowhere\.pth cannot be read as weights"):
        convert(tmp_path / "nowhere.pth", tmp_path / "folder")


@pytest.mark.parametrize("present", ["config.json", "model-00001-of-00002.safetensors"])
def test_a_model_is_not_written_over(present: str, tmp_path: Path) -> None:
    torch.save(rwkv5_weights(), tmp_path / "model.pth")
    (tmp_path / present).write_text("{}")
    with pytest.raises(PolicyError, match=f"holds a model already: {present}"):
        convert(tmp_path / "model.pth", tmp_path)
    assert (tmp_path / present).read_text() == "{}"


def test_weights_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    weights = rwkv5_weights()
    stem = weights["blocks.0.att.key.weight"]
    weights |= {"head.weight": weights["emb.weight"], "blocks.1.att.key.weight": stem.T}
    torch.save(weights, tmp_path / "model.pth")
    convert(tmp_path / "model.pth", tmp_path / "folder")
    kept = load_file(tmp_path / "folder" / "model.safetensors")
    assert kept.keys() == weights.keys()
    assert all(torch.equal(kept[name], weights[name]) for name in weights)


def test_a_folder_that_cannot_be_written_holds_no_half_of_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(rwkv5_weights(), tmp_path / "model.pth")
    (tmp_path / "file").write_text("")
    with pytest.raises(PolicyError, match="file cannot be written"):
        convert(tmp_path / "model.pth", tmp_path / "file")

    def full(_: Path, __: str) -> int:
        raise OSError("No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_text", full)
    with pytest.raises(PolicyError, match="cannot be written: No space left on device"):
        convert(tmp_path / "model.pth", tmp_path / "folder")
    assert not [*(tmp_path / "folder").iterdir()]
