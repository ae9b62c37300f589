"""The last layers of a checkpoint are left out where fewer are typed, and only there."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from dsv3.checkpoint.load import open_hf_checkpoint
from dsv3.errors import UserError
from dsv3.hf.config_json import model_from_hf
from tests.convert.releases import read_release
from tests.harness.commands import ConvertCommand
from tests.harness.outcome import refused

FEWER = ["model.num_layers=2", "model.mtp_depths=0"]


def layers(tensors: dict[str, torch.Tensor]) -> set[str]:
    """Return the numbers of the layers that tensors belong to."""
    return {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}


@pytest.mark.parametrize("first", ["hf_to_hf", "hf_to_dcp"])
def test_the_first_layers_stay_as_they_are_and_the_rest_is_counted(
    convert: ConvertCommand, bf16_release: Path, tmp_path: Path, first: str
) -> None:
    whole = read_release(bf16_release)
    assert layers(whole) == {"0", "1", "2", "3"}
    out, back = tmp_path / "out", tmp_path / "back"
    outcome = convert.must(first, bf16_release, out, *FEWER)
    assert "model.num_layers 3 -> 2 (leaves out the last of 3 layers)" in outcome.err
    assert "model.mtp_depths 1 -> 0 (leaves out its MTP layer)" in outcome.err
    dropped = sum(name.startswith(("model.layers.2.", "model.layers.3.")) for name in whole)
    assert f"{dropped} tensors left out, which the model does not have" in outcome.out
    if first == "hf_to_dcp":
        assert yaml.safe_load((out / "model.yaml").read_text())["num_layers"] == 2
        outcome = convert.must("dcp_to_hf", out, back, "model.num_layers=1")
        assert "model.num_layers 2 -> 1" in outcome.err
        out = back
    kept = read_release(out)
    count = 1 if first == "hf_to_dcp" else 2
    assert layers(kept) == {str(number) for number in range(count)}
    assert all(torch.equal(tensor, whole[name]) for name, tensor in kept.items())
    written = json.loads((out / "config.json").read_text())
    assert (written["num_hidden_layers"], written["num_nextn_predict_layers"]) == (count, 0)


def test_a_layer_is_not_left_out_that_nobody_has_named(
    convert: ConvertCommand, bf16_release: Path, tmp_path: Path
) -> None:
    """Neither below an MTP layer nor by a config.json that was cut by hand, with or without MTP layers."""
    out, cut = tmp_path / "out", tmp_path / "cut"
    refused(convert("hf_to_hf", bf16_release, out, FEWER[0]), "leave these out too, model.mtp_depths=0")
    shutil.copytree(bf16_release, cut)
    config = json.loads((cut / "config.json").read_text())
    words = ("has 'model.layers.2.", "counts 2 layers", "put back its num_hidden_layers")
    for depths in (0, 1):
        fewer = config | {"num_hidden_layers": 2, "num_nextn_predict_layers": depths}
        (cut / "config.json").write_text(json.dumps(fewer))
        for direction in ("hf_to_hf", "hf_to_dcp"):
            for typed in ([], ["model.mtp_depths=0"]):
                outcome = convert(direction, cut, out, *typed)
                assert "mtp_depths=0" not in outcome.err.splitlines()[-1]
                assert outcome.code == 2
                assert all(word in outcome.err for word in words), outcome.err
    with pytest.raises(UserError, match=r"has 'model\.layers\.2\..*counts 2 layers"):
        open_hf_checkpoint(cut, model_from_hf(cut))  # as checkpoint.load and task=verify do
    assert not out.exists()
    (cut / "config.json").write_text(json.dumps(config))
    convert.must("hf_to_hf", cut, out, *FEWER)


def test_an_mtp_layer_is_not_taken_for_a_main_one(
    convert: ConvertCommand, bf16_release: Path, tmp_path: Path
) -> None:
    typed = "model.num_layers=4"
    outcome = convert("hf_to_hf", bf16_release, tmp_path / "out", typed, "model.mtp_depths=0")
    assert outcome.code == 2
    assert f"of an MTP layer, which {typed} counts as a main layer: leave {typed} out" in outcome.err
    more = Path(shutil.copytree(bf16_release, tmp_path / "more"))
    config = json.loads((more / "config.json").read_text()) | {"num_hidden_layers": 4}
    (more / "config.json").write_text(json.dumps(config))
    words = ("'model.layers.3.", "counts among its 4 layers: put back its num_hidden_layers")
    refused(convert("hf_to_hf", more, tmp_path / "out"), *words)
