"""A weight that is not finite is named at every entrance, before a model computes with it."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv3.checkpoint.save import Saver, Snapshot
from dsv3.checkpoint.state import model_state
from dsv3.config.checkpoint import CheckpointConfig
from dsv3.config.convert import StoredType
from dsv3.convert.live_export import LiveExporter, stream
from dsv3.errors import RunFailed, UserError
from dsv3.hf.nonfinite import is_finite, require_finite
from tests.convert.releases import random_weights, read_release, small_model, write_release
from tests.convert.test_corrupt import change, first, replace_entry
from tests.harness.checkpoints import seal
from tests.harness.commands import ConvertCommand, TrainCommand
from tests.harness.outcome import refused
from tests.harness.trained import ALONE, Trained

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
NORM = "model.norm.weight"
QUERY = "model.layers.0.self_attn.q_a_proj.weight"
COPY = "model.layers.3.shared_head.head.weight"


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a release whose selection bias was never set, as in a tiny model that is public."""
    directory = tmp_path_factory.mktemp("released")
    weights = random_weights(small_model())
    weights[BIAS] = torch.full_like(weights[BIAS], torch.nan)
    write_release(directory, small_model(), weights=weights)
    return directory


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return settings for ids that need no tokenizer."""
    file = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(file, np.arange(8 * 9, dtype=np.int32).reshape(8, 9) % 96)
    return ["data=tokens", f"data.path={file}", "logger=none"]


NAMED = (f"'{BIAS}' with the value nan at [0]", "8 of 8 read there are not finite")


@pytest.mark.parametrize("task", ["train", "evaluate"])
def test_loading_a_release_names_it(
    commands: TrainCommand, released: Path, ids: list[str], task: str
) -> None:
    steps = ["train.steps=1"] if task == "train" else []
    outcome = commands.run(f"task={task}", f"checkpoint.load=hf:{released}", *ids, *steps)
    assert outcome.code == 2, outcome.err
    for word in (*NAMED, "safetensors has '"):
        assert word in outcome.err


@pytest.mark.parametrize("memory", [[], ["hardware=cpu", "hardware.memory_bytes=100000"]])
def test_verify_names_it(commands: TrainCommand, released: Path, memory: list[str]) -> None:
    outcome = commands.run("task=verify", "model=hf", f"model.path={released}", *memory)
    refused(outcome, *NAMED)


@pytest.mark.parametrize(
    ("direction", "dtype"), [("hf_to_dcp", "bf16"), ("hf_to_hf", "bf16"), ("hf_to_hf", "fp8")]
)
def test_converting_a_release_names_it(
    convert: ConvertCommand, released: Path, tmp_path: Path, direction: str, dtype: str
) -> None:
    refused(convert(direction, released, tmp_path / "out", f"dtype={dtype}"), *NAMED)
    assert not (tmp_path / "out").exists()


def nan_code(tensor: Tensor) -> Tensor:
    """Set the fp8 code of NaN at [3, 5]."""
    changed = tensor.clone()
    changed.view(torch.uint8)[3, 5] = 0xFF
    return changed


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_a_nan_among_fp8_codes_is_named(
    convert: ConvertCommand, fp8_release: Path, tmp_path: Path, dtype: str
) -> None:
    source = Path(shutil.copytree(fp8_release, tmp_path / "in"))
    change(QUERY, nan_code)(source)
    refused(convert("hf_to_hf", source, tmp_path / "out", f"dtype={dtype}"), f"'{QUERY}'", "nan at [3, 5]")


@pytest.mark.parametrize("dtype", ["fp8", "fp32"])
def test_a_scale_with_which_codes_are_past_fp32_is_named(
    convert: ConvertCommand, fp8_release: Path, tmp_path: Path, dtype: str
) -> None:
    """In fp8 too, whose codes are copied. Codes that stay below are read with the same scale."""
    source = Path(shutil.copytree(fp8_release, tmp_path / "in"))
    change(QUERY + "_scale_inv", first(3e38))(source)
    words = (f"'{QUERY}_scale_inv' with a scale of 3", "e+38: codes of its block times it are past fp32")
    refused(convert("hf_to_hf", source, tmp_path / "out", f"dtype={dtype}"), *words)
    ones = torch.full((24, 64), 0x38, dtype=torch.uint8).view(torch.float8_e4m3fn)
    change(QUERY, lambda _: ones)(source)
    convert.must("hf_to_hf", source, tmp_path / "out", f"dtype={dtype}")


@pytest.mark.parametrize("direction", ["hf_to_hf", "dcp_to_hf"])
def test_a_weight_that_overflows_in_bf16_is_told_as_finite(
    convert: ConvertCommand, tmp_path: Path, direction: str
) -> None:
    weights = random_weights(small_model())
    weights[NORM][3] = 3.4e38
    source, out = tmp_path / "in", tmp_path / "out"
    write_release(source, small_model(), "fp32", weights=weights)
    if direction == "dcp_to_hf":
        convert.must("hf_to_dcp", source, tmp_path / "dcp", "dtype=fp32")
        source = tmp_path / "dcp"
    words = (f"'{NORM}' with the value 3.4e+38 at [3]", "is finite there", "bf16: dtype=fp32 keeps it")
    refused(convert(direction, source, out, "dtype=bf16"), *words)
    convert.must(direction, source, out, "dtype=fp32")
    assert torch.equal(read_release(out)[NORM], weights[NORM])


@pytest.fixture(scope="module")
def dcp(tmp_path_factory: pytest.TempPathFactory, fp8_release: Path) -> Path:
    """Return a converted checkpoint with an infinity in its last norm."""
    from dsv3.config.convert import ConvertConfig, Direction
    from dsv3.convert.convert import convert

    directory = tmp_path_factory.mktemp("converted") / "dcp"
    convert(ConvertConfig(Direction.hf_to_dcp, str(fp8_release), str(directory), model=small_model()))

    def infinite(norm: Tensor) -> Tensor:
        norm[7] = torch.inf
        return norm

    replace_entry(infinite)(directory)
    seal(directory)
    return directory


@pytest.mark.parametrize("task", ["train", "evaluate"])
def test_loading_a_dcp_names_it(commands: TrainCommand, dcp: Path, ids: list[str], task: str) -> None:
    steps = ["train.steps=1"] if task == "train" else []
    outcome = commands.run(f"task={task}", f"checkpoint.load={dcp}", *ids, *steps)
    assert outcome.code == 2, outcome.err
    assert f"{dcp} has 'model.norm.weight' with the value inf at [7], 1 of 64 read" in outcome.err


def test_converting_a_dcp_names_it(convert: ConvertCommand, dcp: Path, tmp_path: Path) -> None:
    refused(convert("dcp_to_hf", dcp, tmp_path / "out"), f"'{NORM}' with the value inf at [7]")
    assert not (tmp_path / "out").exists()


def test_copies_of_mtp_layers_that_differ_are_told_with_the_way_out(
    commands: TrainCommand, convert: ConvertCommand, fp8_release: Path, tmp_path: Path, ids: list[str]
) -> None:
    source = Path(shutil.copytree(fp8_release, tmp_path / "in"))
    change(COPY, lambda tensor: tensor * 2)(source)
    words = (
        f"'{COPY}' that is not equal to 'lm_head.weight'",
        "model.mtp_depths=0 leaves the MTP layers out",
    )
    refused(convert("hf_to_dcp", source, tmp_path / "out"), *words)
    evaluate = ["task=evaluate", f"checkpoint.load=hf:{source}", *ids]
    outcome = commands.run(*evaluate)
    assert outcome.code == 2
    assert all(word in outcome.err for word in words), outcome.err
    convert.must("hf_to_dcp", source, tmp_path / "out", "model.mtp_depths=0")
    commands.must(*evaluate, "model.mtp_depths=0")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_one_value_among_others_is_found(dtype: torch.dtype) -> None:
    values = torch.linspace(-400, 400, 60).view(6, 10).to(dtype)
    assert is_finite(values)
    assert is_finite(values[:0])
    require_finite(values, Path("x"), "w")
    infinite = (torch.inf, -torch.inf) if dtype is not torch.float8_e4m3fn else ()  # fp8 has none
    for value in (torch.nan, -torch.nan, *infinite):
        values[4, 7] = value
        assert not is_finite(values)
        assert not is_finite(values[:, 5:])
        with pytest.raises(UserError, match=r"'w' with the value -?(nan|inf) at \[104, 27\], 1 of 60"):
            require_finite(values, Path("x"), "w", (100, 20))


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("direction", ["hf_to_hf", "hf_to_dcp"])
def test_a_matrix_that_overflows_in_what_is_written_is_named(
    convert: ConvertCommand, tmp_path: Path, direction: str, dtype: str
) -> None:
    if (direction, dtype) == ("hf_to_dcp", "fp8"):
        return  # a DCP has no fp8
    weights = random_weights(small_model())
    weights[QUERY][2, 1] = -3.4e38
    write_release(tmp_path / "in", small_model(), "fp32", weights=weights)
    outcome = convert(direction, tmp_path / "in", tmp_path / "out", f"dtype={dtype}")
    refused(outcome, f"'{QUERY}' ", "the value -3.4e+38 at [2, 1]", "overflows in bf16", "fp32 keeps it")
    assert not (tmp_path / "out").exists()


LIVE = "layers.1.ffn.experts.down_proj"


@pytest.mark.parametrize("stored", list(StoredType), ids=lambda stored: stored.name)
@pytest.mark.parametrize("value", [torch.nan, -torch.inf, 3.4e38])
def test_a_live_model_is_not_exported_with_a_value_that_is_not_finite_there(
    tmp_path: Path, stored: StoredType, value: float
) -> None:
    trained = Trained(0)
    parts = {"model_parts": [trained.model], "state_dict": trained.model.state_dict}
    model: Any = SimpleNamespace(mesh=None, device=torch.device("cpu"), **parts)
    exporter = LiveExporter(model, tmp_path, ALONE, stored)
    with torch.no_grad():
        trained.model.get_parameter(LIVE)[3, 2, 1] = value
    if value == 3.4e38 and stored is StoredType.fp32:
        exporter.write(tmp_path / "hf" / "step-1")
        assert read_release(tmp_path / "hf" / "step-1")
        return
    with pytest.raises(RunFailed, match=r"cannot be written: '.*' has the value .* at \[") as failed:
        exporter.write(tmp_path / "hf" / "step-1")
    told = str(failed.value)
    assert LIVE in told or "experts.3.down_proj" in told
    assert ("overflows in bf" in told) == (value == 3.4e38)
    assert list((tmp_path / "hf").iterdir()) == []
    dtype = torch.float32 if stored is StoredType.fp32 else torch.bfloat16
    with pytest.raises(RunFailed, match=r"'model\.layers\.1\.mlp\.experts\.3\.down_proj\.weight' has"):
        list(stream(model, dtype))


def test_a_checkpoint_of_a_run_is_not_converted_with_a_weight_that_is_not_finite(
    convert: ConvertCommand, tmp_path: Path
) -> None:
    """One that went bad on its way to the disk: a run refuses to save it."""
    run, trained = tmp_path / "run", Trained(0)
    with torch.no_grad():
        trained.model.get_parameter("norm.weight")[7] = -torch.inf
    with pytest.raises(RunFailed, match=r"model\.norm\.weight is not finite"):
        trained.save(run)
    snapshot = Snapshot(dict(model_state([trained.model])), None, trained.model.config, trained.progress)
    Saver(run, CheckpointConfig(), ALONE).write(snapshot)
    for source in (run, run / "checkpoints" / "step-1"):
        refused(convert("dcp_to_hf", source, tmp_path / "out"), f"'{NORM}' with the value -inf at [7]")
    assert not (tmp_path / "out").exists()
