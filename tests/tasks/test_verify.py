"""task=verify: equal to transformers, or the first layer that departs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.harness.commands import TrainCommand
from tests.harness.outcome import Outcome
from tests.hf.pairs import pair
from tests.hf.test_config_json import RELEASED_V3

pytest.importorskip("transformers")
V3: dict[str, Any] = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
V2: dict[str, Any] = {"norm_topk_prob": False, "q_lora_rank": None, "topk_method": "greedy"}

pytestmark = pytest.mark.slow  # each loads a model into transformers


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A small DeepSeek-V3 as transformers saves it."""
    theirs, _ = pair("deepseek_v3", tmp_path, **V3)
    theirs.save_pretrained(tmp_path / "released")  # type: ignore[operator]
    return tmp_path / "released"


def verify(path: Path, *changes: str) -> list[str]:
    return ["task=verify", "model=hf", f"model.path={path}", *changes]


def test_a_checkpoint_of_transformers_is_verified(commands: TrainCommand, released: Path) -> None:
    outcome = commands.must(*verify(released))
    assert outcome.out.strip() == f"{released}: equals transformers"
    for row in ("embedding", "layer 0", "layer 2", "logits", "loss"):
        assert row in outcome.err


def test_v2_lite_is_verified(commands: TrainCommand, tmp_path: Path) -> None:
    theirs, _ = pair("deepseek_v2", tmp_path, **V2)
    theirs.save_pretrained(tmp_path)  # type: ignore[operator]
    assert "equals transformers" in commands.must(*verify(tmp_path)).out


def test_what_is_read_although_no_release_is_so_equals_transformers(
    commands: TrainCommand, tmp_path: Path
) -> None:
    """Stacked experts, another name, fewer heads of keys, and fp8 in the config of weights that are not."""
    theirs, _ = pair("deepseek_v3", tmp_path, **V3)
    theirs.save_pretrained(tmp_path, save_original_format=False)  # type: ignore[operator]
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "house_v3", "num_key_value_heads": 2, "num_nextn_predict_layers": 0}
    config |= {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    outcome = commands.must(*verify(tmp_path))
    assert "equals transformers" in outcome.out
    assert "quantization_config of fp8, but its weights are not in fp8" in outcome.err


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
    commands: TrainCommand, released: Path, change: str, where: str
) -> None:
    outcome = commands.run(*verify(released, change))
    assert outcome.code == 1
    assert f"departs from transformers first at {where}" in outcome.err


def test_without_transformers_shapes_and_norms_are_checked(
    commands: TrainCommand, released: Path, monkeypatch: pytest.MonkeyPatch
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
    assert outcome.code == 2
    assert "'model.norm.weight' with the value nan at [3]" in outcome.err


def test_mtp_layers_that_transformers_counts_and_does_not_save_are_left_out(
    commands: TrainCommand, released: Path
) -> None:
    config = json.loads((released / "config.json").read_text())
    (released / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    outcome = commands.must(*verify(released))
    assert outcome.out.strip() == f"{released}: equals transformers"
    assert "counts 1 MTP layer, the files hold none: verified with model.mtp_depths=0" in outcome.err
    insisted = commands.run(*verify(released, "model.mtp_depths=1"))
    assert insisted.code == 2
    assert "model.mtp_depths=0 leaves it out" in insisted.err


@pytest.fixture
def too_large(commands: TrainCommand, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """task=verify on a machine with 100 kB of memory, where building the model would fail the test."""

    def never(*arguments: object) -> None:
        raise AssertionError("memory was taken for a model that does not fit")

    monkeypatch.setattr("dsv3.tasks.verify.build_model", never)
    return lambda path, *changes: commands.run(
        *verify(path, "hardware=cpu", "hardware.memory_bytes=100000", *changes)
    )


def test_a_model_larger_than_the_memory_is_checked_tensor_by_tensor(
    too_large: Callable[..., Outcome], released: Path
) -> None:
    outcome = too_large(released)
    assert outcome.code == 0, outcome.err
    assert "names, shapes and norms only: the model needs 0.00 GiB, there are 0.00" in outcome.out
    (file,) = released.glob("*.safetensors")
    tensors = load_file(file)
    norms = dict(line.split()[-2:] for line in outcome.err.splitlines() if "layers.1.ffn" in line)
    experts = [
        tensors[f"model.layers.1.mlp.experts.{expert}.{kind}_proj.weight"]
        for expert in range(16)
        for kind in ("gate", "up")
    ]
    assert float(norms["layers.1.ffn.experts.gate_up_proj"]) == pytest.approx(
        torch.stack(experts).norm().item(), rel=1e-5
    )


@pytest.mark.parametrize(
    ("name", "change", "code", "words"),
    [
        ("model.norm.weight", lambda tensor: tensor.fill_(torch.inf), 2, "with the value inf at [0]"),
        ("model.norm.weight", lambda tensor: tensor[1:].clone(), 2, "'model.norm.weight' of shape [63]"),
        ("model.norm.weight", None, 2, "no tensor 'model.norm.weight'"),
    ],
)
def test_what_is_wrong_in_a_checkpoint_too_large_is_named(
    too_large: Callable[..., Outcome], released: Path, name: str, change: Any, code: int, words: str
) -> None:
    (file,) = released.glob("*.safetensors")
    tensors = load_file(file)
    tensor = tensors.pop(name)
    save_file(tensors if change is None else tensors | {name: change(tensor)}, file)
    outcome = too_large(released)
    assert outcome.code == code
    assert words in outcome.err


def test_a_config_of_671b_without_its_weights_takes_no_memory(commands: TrainCommand, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RELEASED_V3))
    outcome = commands.run(*verify(tmp_path))
    assert outcome.code == 2
    assert "holds no .safetensors files" in outcome.err
    save_file({"model.norm.weight": torch.zeros(7168)}, tmp_path / "model.safetensors")
    outcome = commands.run(*verify(tmp_path))
    assert outcome.code == 2
    assert "no tensor 'model.embed_tokens.weight'" in outcome.err
    assert len(outcome.err.splitlines()) == 2  # the other says that MTP layers are left out


MISTAKES = {
    "model.path=/nope": "model.path=/nope",
    "model.path=null": "model.path=DIR",
    "model.vocab_size=97": "'model.embed_tokens.weight' of shape [96, 64]",
    "model.mtp_depths=1": "model.layers.3.enorm.weight",
    "task.tokens=1": "task.tokens=1",
    "model=debug": "task.path",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(commands: TrainCommand, released: Path, mistake: str) -> None:
    arguments = {item.split("=")[0]: item for item in [*verify(released), mistake]}
    if mistake == "model=debug":
        del arguments["model.path"]
    outcome = commands.run(*arguments.values())
    assert outcome.code == 2
    assert MISTAKES[mistake] in outcome.err
    assert len(outcome.err.splitlines()) <= 2
