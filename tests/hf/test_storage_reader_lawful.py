"""Lawful checkpoints of the family are read, and told where no release is so; all others are refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv3.checkpoint.load import load_weights, open_hf_checkpoint, stored_weights
from dsv3.config.model import ModelConfig
from dsv3.config.strict import build
from dsv3.errors import UserError
from dsv3.hf.config_json import model_from_hf
from dsv3.hf.safetensors_reader import INDEX
from tests.convert.releases import (
    random_weights,
    read_release,
    rewrite_release,
    small_model,
    stack_experts,
    write_release,
)

Weights = dict[str, Tensor]
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
QUERY = "model.layers.0.self_attn.q_a_proj.weight"
EXPERT = "model.layers.1.mlp.experts.0.down_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
COPIES = {"model.layers.3.embed_tokens.weight": EMBEDDING, "model.layers.3.shared_head.head.weight": HEAD}
WHOLE = "model.safetensors"


def loaded(directory: Path, model: ModelConfig | None = None) -> Weights:
    """Return the weights that a model has after loading, by our names."""
    made = build(model or model_from_hf(directory))
    load_weights([made], directory)
    return {name: tensor.clone() for name, tensor in made.state_dict().items()}


def configured(directory: Path, **values: Any) -> None:
    """Change keys of config.json."""
    content = json.loads((directory / "config.json").read_text()) | values
    (directory / "config.json").write_text(json.dumps(content))


def assert_equal(ours: Weights, theirs: Weights) -> None:
    assert ours.keys() == theirs.keys()
    assert not [name for name in theirs if not torch.equal(ours[name], theirs[name])]


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.bfloat16, torch.float16])
def test_scales_of_narrower_dtypes_mean_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    write_release(tmp_path, small_model(), "fp8", power_of_two=True)
    before = loaded(tmp_path)

    def narrow(tensors: Weights) -> None:
        scales = [name for name in tensors if name.endswith("_scale_inv")]
        tensors |= {name: tensors[name].to(dtype) for name in scales}
        assert len({tensors[name].dtype for name in scales}) == 1

    rewrite_release(tmp_path, narrow)
    assert_equal(loaded(tmp_path), before)
    assert stored_weights(tmp_path) == "fp8"


def test_a_block_of_zeros_may_have_the_scale_0(tmp_path: Path) -> None:
    write_release(tmp_path, small_model(), "fp8")  # blocks of 32 x 32, q_a_proj is [24, 64]
    before = loaded(tmp_path)

    def zero(tensors: Weights) -> None:
        tensors[QUERY].view(torch.uint8)[:, 32:] = 0
        tensors[QUERY].view(torch.uint8)[::2, 32:] = 0x80  # -0
        tensors[QUERY + "_scale_inv"][0, 1] = 0

    rewrite_release(tmp_path, zero)
    before["layers.0.attention.q_a_proj.weight"][:, 32:] = 0
    assert_equal(loaded(tmp_path), before)
    rewrite_release(tmp_path, lambda tensors: tensors[QUERY + "_scale_inv"].zero_())
    with pytest.raises(UserError, match=r"scale of 0\.0: it must be above 0"):
        loaded(tmp_path)


def test_a_padded_vocabulary_is_read_without_its_padding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_release(tmp_path, small_model())
    before = loaded(tmp_path)

    def pad(tensors: Weights) -> None:
        for name in (EMBEDDING, HEAD, *COPIES):
            tensors[name] = torch.cat([tensors[name], torch.full((32, 64), 3.0).bfloat16()])

    rewrite_release(tmp_path, pad)
    assert_equal(loaded(tmp_path), before)
    said = capsys.readouterr().err
    assert f"'{EMBEDDING}' has 128 rows for a vocabulary of 96: 32 are padding" in said
    assert f"'{HEAD}' has 128 rows" in said
    # A vocabulary that was typed smaller is no padding.
    with pytest.raises(UserError, match=r"of shape \[128, 64\], the configured model makes it \[95, 64\]"):
        loaded(tmp_path, replace(small_model(), vocab_size=95))


def whole_beside_a_stale_index(directory: Path) -> None:
    index = (directory / INDEX).read_text()
    rewrite_release(directory, lambda _: None)
    (directory / INDEX).write_text(index)


def consolidated_beside_shards(directory: Path) -> None:
    save_file(read_release(directory), directory / "consolidated.safetensors")


def consolidated_without_an_index(directory: Path) -> None:
    consolidated_beside_shards(directory)
    (directory / INDEX).unlink()


def whole_beside_shards(directory: Path) -> None:
    save_file(read_release(directory), directory / WHOLE)
    (directory / INDEX).unlink()


def stale_scales(directory: Path) -> None:
    """Recast to bf16 as DeepSeek's script does, but leave scales in the index and fp8 in config.json."""
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"][QUERY + "_scale_inv"] = index["weight_map"][QUERY]
    (directory / INDEX).write_text(json.dumps(index))
    configured(directory, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda directory: rewrite_release(directory, lambda _: None), []),
        (whole_beside_a_stale_index, ["names files that are not there", f"{WHOLE} is read instead"]),
        (consolidated_beside_shards, []),
        (consolidated_without_an_index, ["passed over: consolidated.safetensors"]),
        (whole_beside_shards, [f"beside {WHOLE}", "model-00001-of-00003.safetensors"]),
        (
            stale_scales,
            ["still lists 1 scale grid of fp8", "quantization_config of fp8, but its weights are not"],
        ),
        (lambda directory: configured(directory, foo=3, pretraining_tp=2), ["passed over: 'foo'"]),
        (lambda directory: configured(directory, num_key_value_heads=1, model_type="house_v3"), []),
    ],
)
def test_other_files_and_keys_give_the_same_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], None], words: list[str]
) -> None:
    write_release(tmp_path, small_model())
    before = loaded(tmp_path)
    assert capsys.readouterr().err == ""
    change(tmp_path)
    assert_equal(loaded(tmp_path), before)
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert bool(words) == bool(said), said


def test_biases_in_bf16_are_read_exactly(tmp_path: Path) -> None:
    write_release(tmp_path, small_model())
    expected = read_release(tmp_path)[BIAS].bfloat16()
    rewrite_release(tmp_path, lambda tensors: tensors.update({BIAS: expected}))
    bias = loaded(tmp_path)["layers.1.ffn.router.selection_bias"]
    assert bias.dtype is torch.float32
    assert torch.equal(bias, expected.float())


@pytest.mark.parametrize("changes", [{"first_k_dense_replace": 9}, {"n_routed_experts": None}])
def test_a_model_without_any_moe_layer_is_read_and_computes(tmp_path: Path, changes: dict[str, Any]) -> None:
    dense = replace(small_model(), num_dense_layers=3, mtp_depths=0)
    write_release(tmp_path, dense)
    configured(tmp_path, **changes)
    model = build(model_from_hf(tmp_path))
    load_weights([model], tmp_path)
    assert_equal({**model.state_dict()}, loaded(tmp_path, dense))
    tokens = torch.arange(24).view(2, 12)
    assert bool(model(tokens).logits.isfinite().all())


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_stacked_experts_are_those_of_single_experts(tmp_path: Path, dtype: str) -> None:
    model = replace(small_model(), moe=replace(small_model().moe, hidden_dim=64))  # whole blocks per half
    write_release(tmp_path, model, dtype)
    before = loaded(tmp_path)

    def stack_all(tensors: Weights) -> None:
        for layer in (1, 2, 3):
            stack_experts(tensors, layer)
            if dtype == "fp8":
                stack_experts(tensors, layer, "weight_scale_inv")

    rewrite_release(tmp_path, stack_all)
    assert not [name for name in load_file(tmp_path / WHOLE) if ".experts.0." in name]
    assert_equal(loaded(tmp_path), before)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({EXPERT: torch.zeros(64, 48)}), ["down_proj'", f"'{EXPERT}' is there as well"]),
        (
            lambda t: t.update({"model.layers.1.mlp.experts.gate_up_proj": t[QUERY].clone()}),
            ["[24, 64]", "even rows"],
        ),
        (
            lambda t: t.update({k: v.mT for k, v in t.items() if "layers.1.mlp.experts.down_proj" in k}),
            [EXPERT, "of shape [48, 64]", "[64, 48]"],
        ),
    ],
)
def test_a_stack_of_another_form_is_refused(
    tmp_path: Path, change: Callable[[Weights], object], words: list[str]
) -> None:
    write_release(tmp_path, small_model())

    def make(tensors: Weights) -> None:
        stack_experts(tensors, 1)
        change(tensors)

    rewrite_release(tmp_path, make)
    with pytest.raises(UserError) as error:
        loaded(tmp_path)
    assert all(word in str(error.value) for word in words), error.value


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:c2388e6b\nsize 5234139343\n"


def add(name: str, tensor: Tensor) -> Callable[[Path], None]:
    return lambda directory: rewrite_release(directory, lambda tensors: tensors.update({name: tensor}))


def only_bin(directory: Path) -> None:
    for file in (*directory.glob("*.safetensors"), directory / INDEX):
        file.unlink()
    (directory / "pytorch_model-00001-of-00002.bin").write_bytes(b"PK")


def cut(directory: Path) -> None:
    rewrite_release(directory, lambda tensors: void(tensors.pop("model.layers.3.mlp.gate.weight")))


def void(_: object) -> None:
    """Drop a value."""


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda directory: void((directory / name).write_text(text))


INDEXER = "model.layers.1.self_attn.indexer.wk.weight"
REFUSED: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "V3.2's tensors": (add(INDEXER, torch.ones(4, 4)), [INDEXER, "V3.2", "indexer", "full attention"]),
    "packed integers": (
        add(EXPERT + "_packed", torch.ones(4, 4, dtype=torch.int32)),
        [EXPERT + "_packed", "quantization that is not read", "bf16 or in DeepSeek's block-fp8"],
    ),
    "NVFP4": (
        add(EXPERT + "_scale_2", torch.ones(1)),
        [EXPERT + "_scale_2", "quantization that is not read"],
    ),
    "a wrapped text model": (
        add("language_model." + QUERY, torch.ones(2)),
        ["'language_model.", "images or sound", "text model alone"],
    ),
    "an adapter": (add("base_model.model.lora_A.weight", torch.ones(2)), ["adapter", "merge"]),
    "pickles alone": (only_bin, ["pytorch_model-00001-of-00002.bin", "save_pretrained()"]),
    "a pointer for a shard": (write("model-00002-of-00003.safetensors", POINTER), ["00002", "git lfs pull"]),
    "a pointer for the index": (write(INDEX, POINTER), [INDEX, "git lfs pull"]),
    "a pointer for config.json": (write("config.json", POINTER), ["config.json", "direction=download"]),
    "a cut MTP layer": (cut, ["no tensor 'model.layers.3.mlp.gate.weight'", "model.mtp_depths=0"]),
    "NVFP4 by its file": (
        write("hf_quant_config.json", '{"quantization": {"quant_algo": "NVFP4", "group_size": 16}}'),
        ["hf_quant_config.json", "ModelOpt", "'NVFP4'", "bf16"],
    ),
    "another architecture under a typed model": (
        lambda directory: configured(directory, architectures=["DeepseekV32ForCausalLM"]),
        ["DeepSeek-V3.2", "indexer"],
    ),
    "keys of another architecture under a typed model": (
        lambda directory: configured(directory, swiglu_limit=10.0),
        ["swiglu_limit=10.0", "limits in SwiGLU"],
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_computes_something_else_is_refused_at_loading(tmp_path: Path, what: str) -> None:
    change, words = REFUSED[what]
    model = small_model()
    write_release(tmp_path, model)
    change(tmp_path)
    with pytest.raises(UserError) as error:
        loaded(tmp_path, model)
    assert all(word in str(error.value) for word in words), error.value
    assert len(str(error.value).splitlines()) == 1


def test_a_cut_mtp_layer_is_left_out_as_the_message_says(tmp_path: Path) -> None:
    write_release(tmp_path, small_model())
    before = loaded(tmp_path)
    cut(tmp_path)
    found = loaded(tmp_path, replace(small_model(), mtp_depths=0))
    assert_equal(found, {name: tensor for name, tensor in before.items() if not name.startswith("mtp.")})


def test_a_tensor_without_a_place_names_the_number_that_was_typed(tmp_path: Path) -> None:
    write_release(tmp_path, small_model())
    fix = "leave model.moe.selection_bias=false out"
    with pytest.raises(UserError, match=f"e_score_correction_bias', for which the configured .*: {fix}"):
        loaded(tmp_path, small_model("model.moe.selection_bias=false"))


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_of_an_mtp_layer_that_differs_is_told_at_loading(tmp_path: Path, name: str) -> None:
    """The last value differs, which another rank would read."""
    weights = random_weights(small_model())
    weights[name] = weights[name].clone()
    weights[name][-1, -1] = 7
    write_release(tmp_path, small_model(), weights=weights)
    with pytest.raises(UserError) as error:
        loaded(tmp_path)
    for word in (f"'{name}' that is not equal to '{COPIES[name]}'", "model.mtp_depths=0 leaves"):
        assert word in str(error.value)
    assert loaded(tmp_path, replace(small_model(), mtp_depths=0))


def test_headers_alone_are_read_for_the_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_release(tmp_path, small_model(), "fp8")
    monkeypatch.setattr(
        "dsv3.hf.safetensors_reader.SafetensorsReader._read", lambda *_: pytest.fail("a read")
    )
    open_hf_checkpoint(tmp_path, small_model()).close()
