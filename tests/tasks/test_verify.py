"""task=verify: equal to transformers, or the first layer that departs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.running import Commands
from tests.hf.pairs import pair

pytest.importorskip("transformers")
V3: dict[str, Any] = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
V2: dict[str, Any] = {"norm_topk_prob": False, "q_lora_rank": None, "topk_method": "greedy"}


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A small DeepSeek-V3 as transformers saves it."""
    theirs, _ = pair("deepseek_v3", tmp_path, **V3)
    theirs.save_pretrained(tmp_path / "released")  # type: ignore[operator]
    return tmp_path / "released"


def verify(path: Path, *changes: str) -> list[str]:
    return ["task=verify", "model=hf", f"model.path={path}", *changes]


def test_a_checkpoint_of_transformers_is_verified(commands: Commands, released: Path) -> None:
    outcome = commands.must(*verify(released))
    assert outcome.out.strip() == f"{released}: equals transformers"
    for row in ("embedding", "layer 0", "layer 2", "logits", "loss"):
        assert row in outcome.err


def test_v2_lite_is_verified(commands: Commands, tmp_path: Path) -> None:
    theirs, _ = pair("deepseek_v2", tmp_path, **V2)
    theirs.save_pretrained(tmp_path)  # type: ignore[operator]
    assert "equals transformers" in commands.must(*verify(tmp_path)).out


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ("model.norm_eps=1e-2", "layer 0"),
        ("model.rope.theta=500", "layer 0"),
        ("model.moe.route_scale=2.4", "layer 1"),
        ("model.moe.normalize_top_k=false", "layer 1"),
        ("model.moe.top_k_groups=3", "layer 1"),
    ],
)
def test_the_first_layer_that_departs_is_named(
    commands: Commands, released: Path, change: str, where: str
) -> None:
    outcome = commands.run(*verify(released, change))
    assert outcome.code == 1
    assert f"departs from transformers first at {where}" in outcome.err


def test_without_transformers_shapes_and_norms_are_checked(
    commands: Commands, released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    outcome = commands.must(*verify(released))
    assert "shapes and norms only: transformers is not installed" in outcome.out
    assert "layers.1.ffn.experts.gate_up_proj" in outcome.err
    (file,) = released.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, file)
    outcome = commands.run(*verify(released))
    assert outcome.code == 1
    assert "'norm.weight' holds numbers that are not finite" in outcome.err


MISTAKES = {
    "model.path=/nope": "model.path=/nope",
    "model.path=null": "model.path=DIR",
    "model.vocab_size=97": "'model.embed_tokens.weight' has shape [96, 64]",
    "model.mtp_depths=1": "model.layers.3.enorm.weight",
    "task.tokens=1": "task.tokens=1",
    "model=debug": "task.path",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(commands: Commands, released: Path, mistake: str) -> None:
    arguments = {item.split("=")[0]: item for item in [*verify(released), mistake]}
    if mistake == "model=debug":
        del arguments["model.path"]
    outcome = commands.run(*arguments.values())
    assert outcome.code == 2
    assert MISTAKES[mistake] in outcome.err
    assert len(outcome.err.splitlines()) <= 2
