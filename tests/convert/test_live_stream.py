"""HF checkpoints: every tensor of a file goes to its place, fp8 blocks by their scales."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv3.checkpoint.load import load_weights
from dsv3.config.strict import build
from dsv3.convert.live_export import hf_weight_norms
from dsv3.errors import UserError
from dsv3.hf.config_json import model_from_hf
from dsv3.hf.names import hf_layout
from dsv3.model.transformer import Transformer
from tests.hf.pairs import pair

pytest.importorskip("transformers")
V3: dict[str, Any] = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
# As DeepSeek-V3's repository names them (README_WEIGHTS.md of the release).
MTP_LAYER = {
    "model.layers.61.enorm.weight",
    "model.layers.61.hnorm.weight",
    "model.layers.61.eh_proj.weight",
    "model.layers.61.shared_head.norm.weight",
    "model.layers.61.input_layernorm.weight",
    "model.layers.61.post_attention_layernorm.weight",
    "model.layers.61.self_attn.q_a_proj.weight",
    "model.layers.61.self_attn.q_a_layernorm.weight",
    "model.layers.61.self_attn.q_b_proj.weight",
    "model.layers.61.self_attn.kv_a_proj_with_mqa.weight",
    "model.layers.61.self_attn.kv_a_layernorm.weight",
    "model.layers.61.self_attn.kv_b_proj.weight",
    "model.layers.61.self_attn.o_proj.weight",
    "model.layers.61.mlp.gate.weight",
    "model.layers.61.mlp.gate.e_score_correction_bias",
    "model.layers.61.mlp.shared_experts.gate_proj.weight",
    "model.layers.61.mlp.shared_experts.up_proj.weight",
    "model.layers.61.mlp.shared_experts.down_proj.weight",
}


def released(tmp_path: Path, **changes: Any) -> tuple[Path, Transformer]:
    """Return a checkpoint that transformers wrote, and our model with the same weights."""
    theirs, ours = pair("deepseek_v3", tmp_path, **{**V3, **changes})
    theirs.save_pretrained(tmp_path / "released")  # type: ignore[operator]
    return tmp_path / "released", ours


def empty(directory: Path) -> Transformer:
    model: Transformer = build(model_from_hf(directory))
    for tensor in model.state_dict().values():
        tensor.fill_(torch.nan)
    return model


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}])
def test_a_file_of_transformers_fills_every_parameter(tmp_path: Path, changes: dict[str, Any]) -> None:
    directory, expected = released(tmp_path, **changes)
    model = empty(directory)
    load_weights([model], directory)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.state_dict().items()}
    names = {tensor.name for tensor in hf_layout(model.config, shapes)}
    (file,) = directory.glob("*.safetensors")
    assert names == set(load_file(file))


def test_mtp_layers_have_the_released_names() -> None:
    from dsv3.config.strict import strict
    from tests.harness.composing import compose

    config = strict(compose(["model=671b"])).model
    with torch.device("meta"):
        model = build(config)
    state = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if name.startswith("mtp.")}
    names = {tensor.name for tensor in hf_layout(config, shapes)}
    experts = {
        f"model.layers.61.mlp.experts.{n}.{kind}_proj.weight"
        for n in range(256)
        for kind in ("gate", "up", "down")
    }
    assert names == MTP_LAYER | experts


def add(directory: Path, **tensors: Tensor) -> None:
    """Add tensors to a checkpoint's only file."""
    (file,) = directory.glob("*.safetensors")
    save_file({**load_file(file), **tensors}, file)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.q_proj.bias",
        "model.layers.1.mlp.experts.16.up_proj.weight",
        "model.layers.0.self_attn.rotary_emb.cos",
        "lm_head.bias",
    ],
)
def test_a_tensor_that_the_model_has_no_place_for_is_named(tmp_path: Path, name: str) -> None:
    directory, _ = released(tmp_path)
    add(directory, **{name: torch.zeros(2)})
    with pytest.raises(UserError, match=f"has '{name}', for which"):
        load_weights([empty(directory)], directory)


def test_rotary_tables_and_mtp_layers_may_be_left_over(tmp_path: Path) -> None:
    directory, _ = released(tmp_path)
    names = ["model.layers.1.self_attn.rotary_emb.inv_freq", "model.layers.3.shared_head.head.weight"]
    add(directory, **{name: torch.zeros(2) for name in names})
    load_weights([empty(directory)], directory)


def test_mtp_layers_that_were_not_saved_are_named_with_the_way_round(tmp_path: Path) -> None:
    directory, _ = released(tmp_path)
    model: Transformer = build(replace(model_from_hf(directory), mtp_depths=1))
    with pytest.raises(UserError, match=r"model\.layers\.3\.enorm\.weight.*model\.mtp_depths=0"):
        load_weights([model], directory)


def test_norms_are_those_of_the_loaded_weights(tmp_path: Path) -> None:
    directory, expected = released(tmp_path)
    norms = hf_weight_norms(model_from_hf(directory), directory)
    state = expected.state_dict()
    assert norms == {name: pytest.approx(state[name].norm().item(), rel=1e-5) for name in state}


def test_what_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    directory, _ = released(tmp_path)
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    left_out = "model.layers.2.mlp.experts.7.up_proj.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != left_out}, file)
    with pytest.raises(UserError, match=left_out):
        load_weights([empty(directory)], directory)
    file.write_bytes(b"no tensors")
    with pytest.raises(UserError, match=file.name):
        load_weights([empty(directory)], directory)
    file.unlink()
    with pytest.raises(UserError, match=r"holds no \.safetensors"):
        load_weights([empty(directory)], directory)
