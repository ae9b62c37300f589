"""Exports in fp8 as transformers reads them: the warning names what it misreads, and bf16 is read alike."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv3.checkpoint.load import open_hf_checkpoint, parameter_shapes
from dsv3.config.convert import Unaligned
from dsv3.config.strict import strict
from dsv3.convert.fp8_choice import Fp8Choice
from dsv3.errors import UserError
from dsv3.fp8.quantize import quantize_reference
from dsv3.hf.config_json import model_from_hf
from dsv3.hf.names import HFTensor, hf_layout
from tests.convert.releases import read_release, small_model, write_release
from tests.fp8.plain import dequantize_reference
from tests.harness.commands import ConvertCommand
from tests.harness.composing import compose
from tests.harness.runs import contents
from tests.harness.tiny import model_config

BLOCK = (128, 128)

HALF_BLOCKS = [
    "model.dim=256",
    "model.dense_hidden_dim=192",
    "model.attention.q_lora_rank=128",
    "model.attention.kv_lora_rank=128",
    "model.attention.qk_nope_head_dim=32",
    "model.attention.qk_rope_head_dim=64",
    "model.attention.v_head_dim=32",
    "model.moe.hidden_dim=192",
    "model.moe.num_experts=2",
    "model.moe.num_groups=1",
    "model.moe.top_k_groups=1",
    "model.moe.top_k=1",
    "model.mtp_depths=0",
]
"""Sides of one and a half blocks, beside matrices of whole blocks."""

LoadWeights = Callable[[Path], dict[str, Tensor]]


@pytest.fixture
def load_with_transformers(monkeypatch: pytest.MonkeyPatch) -> LoadWeights:
    """Return a function that loads a checkpoint with transformers and names weights as files do."""
    transformers = pytest.importorskip("transformers")
    # It asks for a package that it does not use to load on a CPU.
    quantizer = "transformers.quantizers.quantizer_finegrained_fp8"
    monkeypatch.setattr(f"{quantizer}.is_accelerate_available", lambda: True)

    def load(directory: Path) -> dict[str, Tensor]:
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        found = {}
        for name, value in model.state_dict().items():
            module, _, kind = name.rpartition(".")
            for expert, matrix in enumerate(value) if module.endswith(".experts") else ():
                halves = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else ["down_proj"]
                for half, part in zip(halves, matrix.chunk(len(halves)), strict=True):
                    found[f"{module}.{expert}.{half}.weight"] = part
            if not module.endswith(".experts"):
                found[name] = value
        return found

    return load


def as_written(directory: Path) -> dict[str, Tensor]:
    """Return the weights of a checkpoint as dsv3 reads them, in fp32."""
    source = open_hf_checkpoint(directory, model_from_hf(directory))
    return {
        tensor.name: source.read_rows(tensor, 0, tensor.shape[0], torch.empty(tensor.shape))
        for tensor in source.layout
    }


def pattern(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def test_the_warning_names_what_transformers_misreads_and_bf16_is_read_alike(
    convert: ConvertCommand, tmp_path: Path, load_with_transformers: LoadWeights
) -> None:
    write_release(tmp_path / "in", model_config(*HALF_BLOCKS))
    command = ["hf_to_hf", tmp_path / "in"]
    told = convert.must(*command, tmp_path / "fp8", "dtype=fp8").err  # type: ignore[arg-type]
    theirs, ours = load_with_transformers(tmp_path / "fp8"), as_written(tmp_path / "fp8")
    wrong = {
        pattern(name): list(value.shape)
        for name, value in ours.items()
        if not torch.allclose(theirs[name].float(), value, rtol=2**-7)
    }
    named = dict(re.findall(r"(model\.\S+) (\[[\d, ]+\]) \(\d+\)", told))
    assert {name: json.loads(shape) for name, shape in named.items()} == wrong
    assert (
        len(wrong) == 10
    )  # kv_a_proj_with_mqa, and three matrices each of dense layer, experts, shared expert

    assert "fp8.unaligned=bf16" in told
    told = convert.must(*command, tmp_path / "bf16", "dtype=fp8", "fp8.unaligned=bf16").err  # type: ignore[arg-type]
    assert "warning" not in told
    theirs, ours = load_with_transformers(tmp_path / "bf16"), as_written(tmp_path / "bf16")
    assert theirs.keys() == ours.keys()
    assert [
        name for name, value in ours.items() if not torch.equal(theirs[name].bfloat16(), value.bfloat16())
    ] == []
    scaled = {pattern(name) for name in read_release(tmp_path / "bf16") if name.endswith("_scale_inv")}
    inside = "model.layers.*.self_attn.{}.weight_scale_inv"
    assert scaled == {inside.format(name) for name in ("q_b_proj", "kv_b_proj", "o_proj")}


@pytest.mark.parametrize("columns", [96, 128, 192, 256])
def test_transformers_misreads_or_refuses_the_shapes_that_are_named(columns: int) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    generator = torch.Generator().manual_seed(0)
    for rows in (64, 100, 128, 192, 256, 320, 384, 448, 576, 640):
        weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
        codes, scales = quantize_reference(weight, BLOCK)
        try:
            found = Fp8Dequantize(None)._dequantize_one(codes, scales)
            alike = torch.equal(found, dequantize_reference(codes, scales))
        except ValueError:
            alike = False
        shape = (rows, columns)
        tensor = HFTensor("model.layers.0.self_attn.o_proj.weight", shape, "", (0, 0), shape)
        assert (not Fp8Choice.of([tensor], BLOCK, Unaligned.fp8).misread) == alike, shape


def test_the_grids_of_joined_experts_that_do_not_fit_transformers_own_are_named() -> None:
    """On a GPU it joins the gate and up matrices of an expert, and their grids, into its own parameters."""
    from transformers.integrations.finegrained_fp8 import _alloc_expert_proj

    unfit = []
    for rows in (48, 128, 192, 256, 320):
        kinds = (torch.float8_e4m3fn, torch.float32)
        _, scales = _alloc_expert_proj(1, 2 * rows, 128, *kinds, sf_gran_n=128, sf_gran_k=128, min_sf_out=2)
        name = "model.layers.0.mlp.experts.0.up_proj.weight"
        tensor = HFTensor(name, (rows, 128), "", (0, 0, 0), (1, rows, 128))
        named = bool(Fp8Choice.of([tensor], BLOCK, Unaligned.fp8).misread)
        assert named == (rows % 128 != 0)
        if scales.shape[1] != 2 * -(-rows // 128):
            assert named
            unfit.append(rows)
    assert unfit == [192, 320]


def test_of_a_released_model_the_latents_and_what_engines_join_with_them_are_left_in_bf16() -> None:
    fewer = [
        "model.num_layers=5",
        "model.moe.num_experts=16",
        "model.moe.num_groups=1",
        "model.moe.top_k_groups=1",
    ]
    model = strict(compose(["model=671b", *fewer])).model
    layout = hf_layout(model, parameter_shapes(model))
    choice = Fp8Choice.of(layout, BLOCK, Unaligned.fp8)
    assert choice.misread == {("model.layers.*.self_attn.kv_a_proj_with_mqa.weight", (576, 7168)): 6}
    assert choice.quantization_config({}, 6) == {}
    choice = Fp8Choice.of(layout, BLOCK, Unaligned.bf16)
    joined = ("q_a_proj", "kv_a_proj_with_mqa")
    modules = [f"model.layers.{layer}.self_attn.{name}" for layer in range(6) for name in joined]
    listed = choice.quantization_config({}, 6)["modules_to_not_convert"]
    assert listed == ["lm_head", *modules]


def test_the_list_of_modules_that_came_is_kept_as_far_as_it_is_true() -> None:
    layout = hf_layout(small_model(), parameter_shapes(small_model()))
    everything = Fp8Choice.of(layout, BLOCK, Unaligned.fp8)
    came = {"ignored_layers": ["lm_head", "model.layers.9.mlp", "model.layers.0.mlp.gate_proj", "mlp.gate"]}
    written = everything.quantization_config(came, 4)
    assert written == {"modules_to_not_convert": ["lm_head", "mlp.gate"]}
    attention = Fp8Choice.of(layout, BLOCK, Unaligned.fp8, lambda name: ".self_attn." in name)
    came = {"modules_to_not_convert": ["lm_head", *(f"model.layers.{layer}.mlp" for layer in range(4))]}
    assert attention.quantization_config(came, 4) == came
    listed = attention.quantization_config({}, 4)["modules_to_not_convert"]
    assert {"lm_head", "model.layers.0.mlp.down_proj", "model.layers.2.mlp.experts"} < set(listed)


def test_what_an_fp8_checkpoint_has_in_bf16_stays_in_bf16(convert: ConvertCommand, tmp_path: Path) -> None:
    write_release(tmp_path / "in", model_config(*HALF_BLOCKS))
    convert.must("hf_to_hf", tmp_path / "in", tmp_path / "some", "dtype=fp8", "fp8.unaligned=bf16")
    convert.must("hf_to_hf", tmp_path / "some", tmp_path / "again", "dtype=fp8")
    convert.must("hf_to_dcp", tmp_path / "some", tmp_path / "dcp")
    convert.must("dcp_to_hf", tmp_path / "dcp", tmp_path / "back", "dtype=fp8")
    stored = {
        name: content for name, content in contents(tmp_path / "some").items() if name != "manifest.json"
    }
    for other in ("again", "back"):
        assert contents(tmp_path / other).items() >= stored.items()


def test_a_model_of_no_whole_block_is_refused_in_fp8_without_its_odd_tensors() -> None:
    layout = hf_layout(small_model(), parameter_shapes(small_model()))
    with pytest.raises(
        UserError, match=r"leaves nothing in fp8: no weight fills blocks of 128 x 128; use dtype"
    ):
        Fp8Choice.of(layout, BLOCK, Unaligned.bf16)
