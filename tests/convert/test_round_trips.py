"""Weights converted and back, bit for bit, and the results in torch's own reader and transformers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load

from dsv3.checkpoint.load import parameter_shapes
from dsv3.config.convert import ConvertConfig, Direction, ScaleFormat, StoredType
from dsv3.config.model import ModelConfig
from dsv3.convert.convert import convert
from dsv3.errors import UserError
from dsv3.hf.names import hf_layout
from tests.convert.releases import (
    random_weights,
    read_release,
    rewrite_release,
    small_model,
    stack_experts,
    write_release,
)
from tests.fp8.plain import dequantize_reference

MODELS = {
    "V3 with MTP": [],
    "two MTP depths": ["model.mtp_depths=2"],
    "V2-Lite": [
        "model.mtp_depths=0",
        "model.attention.q_lora_rank=null",
        "model.moe.score_function=softmax",
        "model.moe.selection_bias=false",
        "model.moe.normalize_top_k=false",
        "model.moe.num_groups=1",
        "model.moe.top_k_groups=1",
    ],
    "Moonlight": ["model.mtp_depths=0", "model.attention.q_lora_rank=null", "model.norm_eps=1e-5"],
    "no shared experts": ["model.moe.num_shared_experts=0", "model.mtp_depths=0"],
}


def ask(
    direction: Direction, source: Path, output: Path, model: ModelConfig, dtype: str = "bf16", **more: Any
) -> ConvertConfig:
    return ConvertConfig(direction, str(source), str(output), StoredType(dtype), model=model, **more)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Assert the same names, dtypes, shapes and bytes."""
    assert sorted(ours) == sorted(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype is tensor.dtype, name
        assert ours[name].shape == tensor.shape, name
        mine, other = (t.contiguous().reshape(-1).view(torch.uint8) for t in (ours[name], tensor))
        assert torch.equal(mine, other), name


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("through", ["dcp", "hf"])
def test_bf16_comes_back_as_it_was(tmp_path: Path, name: str, through: str) -> None:
    model = small_model(*MODELS[name])
    stored = write_release(tmp_path / "in", model)
    source, direction = tmp_path / "in", Direction.hf_to_hf
    if through == "dcp":
        convert(ask(Direction.hf_to_dcp, source, tmp_path / "dcp", model))
        source, direction = tmp_path / "dcp", Direction.dcp_to_hf
    convert(ask(direction, source, tmp_path / "out", model, max_shard_size="100KB"))
    same(read_release(tmp_path / "out"), stored)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors.index.json"} < files
    before, after = (json.loads((tmp_path / where / "config.json").read_text()) for where in ("in", "out"))
    assert after == before


def test_duplicates_of_mtp_layers_are_written_where_only_some_came(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, lost = small_model(), "model.layers.3.embed_tokens.weight"
    stored = write_release(tmp_path / "in", model)
    rewrite_release(tmp_path / "in", lambda tensors: tensors.pop(lost))
    convert(ask(Direction.hf_to_hf, tmp_path / "in", tmp_path / "out", model))
    assert f"has no '{lost}' (1 of 2 duplicates of MTP layers)" in capsys.readouterr().err
    convert(ask(Direction.hf_to_dcp, tmp_path / "in", tmp_path / "dcp", model))
    convert(ask(Direction.dcp_to_hf, tmp_path / "dcp", tmp_path / "back", model))
    for output in ("out", "back"):
        same(read_release(tmp_path / output), stored)
    rewrite_release(tmp_path / "in", lambda tensors: tensors.pop("model.layers.3.shared_head.head.weight"))
    convert(ask(Direction.hf_to_hf, tmp_path / "in", tmp_path / "none", model))
    assert sorted(read_release(tmp_path / "none")) == sorted(read_release(tmp_path / "in"))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("scales_apart", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp32", None])
def test_fp8_comes_back_as_it_was(
    tmp_path: Path, power_of_two: bool, scales_apart: bool, dtype: str | None
) -> None:
    """Through a DCP in bf16 or fp32, or (None) from files to files; blocks of 32 are partial at the edges."""
    model = small_model()
    stored = write_release(
        tmp_path / "in", model, "fp8", power_of_two=power_of_two, scales_apart=scales_apart
    )
    source, direction = tmp_path / "in", Direction.hf_to_hf
    if dtype is not None:
        convert(ask(Direction.hf_to_dcp, source, tmp_path / "dcp", model, dtype))
        source, direction = tmp_path / "dcp", Direction.dcp_to_hf
    convert(ask(direction, source, tmp_path / "out", model, "fp8"))
    same(read_release(tmp_path / "out"), stored)
    before, after = (json.loads((tmp_path / where / "config.json").read_text()) for where in ("in", "out"))
    assert after == before


@pytest.mark.parametrize("through", ["dcp", "hf"])
def test_biases_that_came_in_bf16_leave_in_bf16(tmp_path: Path, through: str) -> None:
    model = small_model()
    weights = {
        name: value.bfloat16() if name.endswith("e_score_correction_bias") else value
        for name, value in random_weights(model).items()
    }
    stored = write_release(tmp_path / "in", model, weights=weights)
    source, direction = tmp_path / "in", Direction.hf_to_hf
    if through == "dcp":
        convert(ask(Direction.hf_to_dcp, source, tmp_path / "dcp", model))
        source, direction = tmp_path / "dcp", Direction.dcp_to_hf
    convert(ask(direction, source, tmp_path / "out", model))
    same(read_release(tmp_path / "out"), stored)
    convert(ask(direction, source, tmp_path / "fp32", model, "fp32"))
    assert {tensor.dtype for tensor in read_release(tmp_path / "fp32").values()} == {torch.float32}


def test_stacked_experts_and_scales_in_e8m0_are_converted_as_what_they_mean(tmp_path: Path) -> None:
    model = replace(small_model(), moe=replace(small_model().moe, hidden_dim=64))  # whole blocks per half
    stored = write_release(tmp_path / "in", model, "fp8", power_of_two=True)

    def restore(tensors: dict[str, Tensor]) -> None:
        for layer in (1, 2, 3):
            stack_experts(tensors, layer)
            stack_experts(tensors, layer, "weight_scale_inv")
        scales = {name: t.to(torch.float8_e8m0fnu) for name, t in tensors.items() if "_scale_inv" in name}
        tensors |= scales

    rewrite_release(tmp_path / "in", restore)
    convert(ask(Direction.hf_to_hf, tmp_path / "in", tmp_path / "out", model, "fp8"))
    same(read_release(tmp_path / "out"), stored)


def test_a_block_of_zeros_with_the_scale_0_comes_back_as_it_was(tmp_path: Path) -> None:
    model, query = small_model(), "model.layers.0.self_attn.q_a_proj.weight"
    stored = write_release(tmp_path / "in", model, "fp8")
    stored[query].view(torch.uint8)[:, 32:] = 0x80  # -0
    stored[query + "_scale_inv"][0, 1] = 0
    rewrite_release(tmp_path / "in", lambda tensors: tensors.update(stored))
    convert(ask(Direction.hf_to_dcp, tmp_path / "in", tmp_path / "dcp", model))
    convert(ask(Direction.dcp_to_hf, tmp_path / "dcp", tmp_path / "out", model, "fp8"))
    same(read_release(tmp_path / "out"), stored)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("stored", ["bf16", "fp16", "fp32", "fp8"])
def test_torch_reads_the_dcp_as_plain_arithmetic_makes_it(tmp_path: Path, stored: str, dtype: str) -> None:
    model = small_model()
    released = write_release(tmp_path / "in", model, stored)
    convert(ask(Direction.hf_to_dcp, tmp_path / "in", tmp_path / "dcp", model, dtype))
    numbers = torch.bfloat16 if dtype == "bf16" else torch.float32
    targets: dict[str, Any] = {
        f"model.{name}": torch.full(shape, torch.nan) for name, shape in parameter_shapes(model).items()
    }
    load(targets, checkpoint_id=tmp_path / "dcp", no_dist=True)
    for tensor in hf_layout(model, parameter_shapes(model)):
        value = released[tensor.name]
        if value.dtype is torch.float8_e4m3fn:
            value = dequantize_reference(value, released[tensor.name + "_scale_inv"], (32, 32))
        if not tensor.name.endswith("e_score_correction_bias"):
            value = value.to(numbers)
        box = tuple(slice(o, o + n) for o, n in zip(tensor.offset, tensor.sizes, strict=True))
        assert torch.equal(targets[f"model.{tensor.parameter}"][box].view(tensor.shape), value.float())


def test_new_scales_are_made_where_nothing_is_known(tmp_path: Path) -> None:
    model = small_model()
    stored = write_release(tmp_path / "in", model)
    convert(
        ask(Direction.hf_to_hf, tmp_path / "in", tmp_path / "out", model, "fp8", scale_fmt=ScaleFormat.ue8m0)
    )
    written = read_release(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["weight_block_size"] == [128, 128]
    assert config["scale_fmt"] == "ue8m0"
    scaled = [name for name in stored if name + "_scale_inv" in written]
    assert len(scaled) > 50
    for name in scaled:
        scales = written[name + "_scale_inv"]
        assert torch.equal(scales, torch.exp2(scales.log2().round()))
        numbers = dequantize_reference(written[name], scales)
        # Half a step of E4M3, 2^-4 of the number, and of the smallest where it is subnormal.
        close = torch.isclose(numbers, stored[name].float(), rtol=2**-4, atol=float(scales.max()) * 2**-10)
        assert close.all()


@pytest.mark.parametrize("shared", [1, 0])
def test_transformers_computes_the_same_logits_from_an_export(tmp_path: Path, shared: int) -> None:
    import transformers

    from dsv3.checkpoint.load import load_weights
    from dsv3.config.strict import build

    model = small_model("model.mtp_depths=0", f"model.moe.num_shared_experts={shared}")
    write_release(tmp_path / "in", model, "fp32")
    convert(ask(Direction.hf_to_dcp, tmp_path / "in", tmp_path / "dcp", model, "fp32"))
    convert(ask(Direction.dcp_to_hf, tmp_path / "dcp", tmp_path / "out", model, "fp32"))
    ours = build(model)
    load_weights([ours], tmp_path / "in")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = torch.randint(0, model.vocab_size, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(ours(tokens).logits, theirs(tokens).logits, atol=1e-5)


def test_a_flipped_bit_of_a_dcp_is_found_before_it_is_exported_where_that_is_asked(tmp_path: Path) -> None:
    model = small_model()
    write_release(tmp_path / "in", model)
    convert(ask(Direction.hf_to_dcp, tmp_path / "in", tmp_path / "dcp", model))
    convert(ask(Direction.dcp_to_hf, tmp_path / "dcp", tmp_path / "sound", model, verify=True))
    victim = next((tmp_path / "dcp").glob("*.distcp"))
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 1
    victim.write_bytes(raw)
    with pytest.raises(UserError, match=f"{victim.name} is altered"):
        convert(ask(Direction.dcp_to_hf, tmp_path / "dcp", tmp_path / "out", model, verify=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dcp", "in", "sound"]
