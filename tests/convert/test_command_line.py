"""convert.py as a new user types it: help, mistakes, odd paths, runs, plans and checks."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from dsv3.checkpoint.directory import complete_steps
from dsv3.config.convert import ConvertConfig, Direction
from tests.convert.releases import read_release
from tests.harness.commands import ConvertCommand
from tests.harness.outcome import refused, succeeded
from tests.harness.processes import run_program
from tests.harness.runs import contents
from tests.harness.tiny import MODEL, TRAINING

pytestmark = pytest.mark.slow

ODD = [
    "a b",
    "it's, 'quoted'",
    'say "x"',
    "(1) [2] {3}",
    "k=v",
    "$HOME ${HOME} ${env:HOME} $x",
    "back\\slash\\",
    "ü模",
]


@pytest.fixture(autouse=True)
def _typed(convert: ConvertCommand) -> None:
    """Compose with Hydra what these tests type."""
    convert.whole = True


def test_help_tells_every_direction_and_key(convert: ConvertCommand) -> None:
    outcome = convert.run("--help")
    assert outcome.code == 0
    for direction in Direction:
        assert f"direction={direction.name}" in outcome.out
    for key in ConvertConfig.__dataclass_fields__:
        assert key in outcome.out
    assert all(len(line) <= 105 for line in outcome.out.splitlines())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "direction is missing: give direction=download|hf_to_dcp|dcp_to_hf|hf_to_hf"),
        (["direction=hf_to_dpc"], "Did you mean 'hf_to_dcp'?"),
        (["direction=hf_to_dcp", "inptu=x"], "Did you mean 'input'?"),
        (["direction=hf_to_dcp", "+wrokers=2", "input={in}"], "Did you mean 'workers'?"),
        (["direction=hf_to_dcp", "input={in}", "output=x", "dtype=bf61"], "Did you mean 'bf16'?"),
        (["direction=hf_to_dcp", "input={in}", "output=x", "dtype=fp8"], "it takes bf16 or fp32"),
        (["direction=hf_to_dcp", "input={in}", "output=x", "workers=0"], "workers=0 is not possible"),
        (["direction=hf_to_dcp", "input={in}", "output=x", "workers=x"], "must be auto or a number"),
        (["direction=hf_to_dcp", "input={in}", "output=x", "workers=1.5"], "workers=1.5"),
        (["direction=hf_to_dcp", "input={in}", "output=x", "workers=9999999"], "from 1 to 1024"),
        (["direction=hf_to_hf", "input={in}", "output=x", "max_shard_size=abc"], "max_shard_size=abc"),
        (["direction=hf_to_hf", "input={in}", "output=x", "max_shard_size=5GG"], "Did you mean '5GB'?"),
        (["direction=hf_to_hf", "input={in}", "output=x", "verify=maybe"], "verify=maybe"),
        (["direction=hf_to_dcp", "input={in}"], "output=null is not possible: give a directory, output=DIR"),
        (["direction=hf_to_dcp", "output=x"], "input=null is not possible: give the directory to read"),
        (["direction=hf_to_dcp", "plan=true"], "input=null is not possible: give the directory to read"),
        (["direction=hf_to_dcp", "input=gone", "output=x"], "input=gone is no directory"),
        (["direction=hf_to_dcp", "input={in}/config.json", "output=x"], "config.json is no directory"),
        (["direction=hf_to_dcp", "input=.", "output=x"], "input=. holds no config.json"),
        (["direction=dcp_to_hf", "input=.", "output=x"], "input=. holds neither a run nor a checkpoint"),
        (["direction=dcp_to_hf", "input={in}", "output=x"], "direction=hf_to_dcp and hf_to_hf read it"),
        (
            ["direction=hf_to_dcp", "input={in}", "output=x", "model.path=gone"],
            "model.path=gone is no direct",
        ),
        (["direction=hf_to_dcp", "input={in}", "output=x", "model=671"], "Did you mean '671b'?"),
        (["direction=hf_to_dcp", "input={in}", "output=x", "model=debug"], "leave model=debug out, or type"),
        (["direction=hf_to_dcp", "plan=true", "input={in}", "speeds=[0]"], "speeds=[0.0]"),
        (["direction=download", "output=x"], "repo=null is not possible"),
        (["direction=download", "repo=a/b", "plan=true"], "plan=true does nothing with direction=download"),
        (
            ["direction=download", "repo=a/b", "output=x", "verify=true"],
            "verify=true does nothing with direction=download",
        ),
    ],
)
def test_a_mistake_is_told_in_a_line_or_two(
    convert: ConvertCommand, bf16_release: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    refused(convert.run(*(argument.format_map({"in": bf16_release}) for argument in arguments)), said)
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]


@pytest.mark.parametrize("name", ODD)
def test_paths_may_hold_anything(
    convert: ConvertCommand, bf16_release: Path, tmp_path: Path, name: str
) -> None:
    here = tmp_path / "here"
    source = here / name / "in"
    shutil.copytree(bf16_release, source)
    shutil.copytree(bf16_release, here / name / "model")
    path = f"model.path={name}/model"
    convert.must("hf_to_dcp", f"{name}/in", f"{name}/out", path, "verify=true")  # relative
    convert.must("dcp_to_hf", here / name / "out", here / f"{name} back")  # absolute
    assert read_release(here / f"{name} back").keys() == read_release(source).keys()
    assert sorted(os.listdir(here)) == sorted([name, f"{name} back"])  # noqa: PTH208


def test_a_directory_named_like_a_variable_of_the_environment_is_typed_escaped_and_quoted(
    convert: ConvertCommand, bf16_release: Path, tmp_path: Path
) -> None:
    here = tmp_path / "here"
    shutil.copytree(bf16_release, here / "${oc.env:HOME}" / "in")
    typed = r"\${oc.env:HOME}"
    convert.must("hf_to_dcp", f"'{typed}/in'", f"'{typed}/out'", f"model.path='{typed}/in'", "verify=true")
    convert.must("dcp_to_hf", f'"{typed}/out"', f'"{typed} back"')
    back = here / "${oc.env:HOME} back"
    assert read_release(back).keys() == read_release(bf16_release).keys()
    assert sorted(os.listdir(here)) == ["${oc.env:HOME}", back.name]  # noqa: PTH208


def test_the_real_command_from_another_directory(bf16_release: Path, tmp_path: Path) -> None:
    place = tmp_path / "a b, (c)=$d"
    shutil.copytree(bf16_release, place / "in")
    done = run_program(
        "convert.py", "direction=hf_to_dcp", "input=in", "output=new/out", "verify=true", cwd=place
    )
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == "new/out: every file is as manifest.json says"
    assert "Traceback" not in done.err
    assert sorted(path.name for path in place.iterdir()) == ["in", "new"]


def test_a_manifest_of_the_input_does_not_get_into_the_output(
    convert: ConvertCommand, fp8_release: Path, tmp_path: Path
) -> None:
    """The output of convert.py is as good an input as any."""
    convert.must("hf_to_hf", fp8_release, tmp_path / "1", "verify=true", "dtype=fp8")
    convert.must("hf_to_hf", tmp_path / "1", tmp_path / "2", "verify=true", "dtype=fp8")
    assert contents(tmp_path / "2") == contents(tmp_path / "1")
    convert.must("hf_to_dcp", tmp_path / "1", tmp_path / "dcp", "verify=true")
    convert.must("dcp_to_hf", tmp_path / "dcp", tmp_path / "3", "verify=true", "dtype=fp8")
    assert contents(tmp_path / "3") == contents(tmp_path / "1")


def test_verify_reads_a_finished_output_again(
    convert: ConvertCommand, fp8_release: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    convert.must("hf_to_dcp", fp8_release, output)
    before = contents(output)
    outcome = convert.run("direction=hf_to_dcp", f"output={output}", "verify=true")
    assert (outcome.code, outcome.out) == (0, f"{output}: every file is as manifest.json says\n")
    convert.must("hf_to_dcp", tmp_path / "gone", output, "verify=true")
    for name, content in before.items():
        (output / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        outcome = convert.run("direction=hf_to_dcp", f"output={output}", "verify=true")
        refused(outcome, str(output / name))
        (output / name).write_bytes(content)
    (output / "hf" / "config.json").unlink()
    refused(convert.run("direction=hf_to_dcp", f"output={output}", "verify=true"), "config.json is missing")


def test_a_plan_writes_nothing(convert: ConvertCommand, fp8_release: Path, tmp_path: Path) -> None:
    outcome = convert.run("direction=hf_to_dcp", f"input={fp8_release}", "plan=true", "speeds=[1,2.5]")
    assert outcome.code == 0, outcome.err
    assert "reads 0.00 GB" in outcome.out
    assert len(outcome.out.splitlines()) == 4
    convert.must("hf_to_dcp", fp8_release, tmp_path / "out", "plan=true")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize(
    ("asked", "read", "written"),
    [
        (["direction=hf_to_dcp"], "688.57", "1,365.27"),  # the sizes of DeepSeek-V3's files and of all of it
        (["direction=hf_to_dcp", "dtype=fp32"], "688.57", "2,730.55"),
        (["direction=dcp_to_hf", "dtype=fp8"], "1,365.27", "688.57"),
        (["direction=hf_to_hf"], "688.57", "1,368.98"),
    ],
)
def test_a_plan_of_a_large_model_needs_none_of_its_files(
    convert: ConvertCommand, asked: list[str], read: str, written: str
) -> None:
    outcome = convert.run(*asked, "model=671b", "plan=true", "workers=16")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith(f"reads {read} GB, writes {written} GB, memory at most about")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """Train a run of one step."""
    directory = tmp_path_factory.mktemp("trained") / "my run"
    once = ["train.microbatch_size=4", "train.steps=1", "train.evaluate_every=0"]
    data = ["data=text", f"data.path={text}"]
    succeeded(run_program("train.py", *MODEL, *TRAINING, *once, *data, f"run.dir={directory}"))
    return directory


def test_a_run_and_its_step_are_exported_for_transformers(
    convert: ConvertCommand, run: Path, tmp_path: Path
) -> None:
    import transformers

    from dsv3.checkpoint.dcp_metadata import load_tensors

    (step,) = complete_steps(run)
    before = contents(run)
    convert.must("dcp_to_hf", run, tmp_path / "run", "dtype=fp32", "verify=true")
    convert.must("dcp_to_hf", step, tmp_path / "step", "dtype=fp32", "verify=true")
    convert.must("dcp_to_hf", step.with_name("latest"), tmp_path / "latest", "dtype=fp32")
    assert contents(tmp_path / "run") == contents(tmp_path / "step") == contents(tmp_path / "latest")
    assert contents(run) == before
    trained = {"model.norm.weight": torch.empty(32)}
    load_tensors(step, trained)
    assert torch.equal(read_release(tmp_path / "run")["model.norm.weight"], trained["model.norm.weight"])
    for kind in (transformers.PreTrainedTokenizerFast, transformers.AutoTokenizer):
        tokenizer = kind.from_pretrained(tmp_path / "run")
        assert tokenizer.decode(tokenizer("w1 w23").input_ids, skip_special_tokens=True) == "w1 w23"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype=torch.float32)
    assert model.config.vocab_size == json.loads((tmp_path / "run" / "config.json").read_text())["vocab_size"]
    refused(convert("hf_to_dcp", run, tmp_path / "out"), "direction=dcp_to_hf reads it")
    refused(convert("hf_to_dcp", step, tmp_path / "out"), "direction=dcp_to_hf reads it")


def test_a_run_without_a_checkpoint_is_told(convert: ConvertCommand, run: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    shutil.copy(run / "config.yaml", tmp_path / "new")
    refused(convert("dcp_to_hf", tmp_path / "new", tmp_path / "out"), "input=", "holds no checkpoint yet")


def test_a_conversion_counts_what_it_read_dropped_and_left_out(
    convert: ConvertCommand, fp8_release: Path, tmp_path: Path
) -> None:
    stored = read_release(fp8_release)
    grids = sum(name.endswith("_scale_inv") for name in stored)
    weights = len(stored) - grids
    arguments = ["direction=hf_to_dcp", f"input={fp8_release}"]
    whole = succeeded(convert.run(*arguments, f"output={tmp_path / 'whole'}")).out
    assert (
        f"{weights - 2} tensors read from 3 files, {grids} scale grids with them, 2 duplicates of MTP"
        in whole
    )
    assert "left out" not in whole
    files = len(list((tmp_path / "whole").glob("*.distcp"))) + 1  # the scale grids have a file of their own
    assert f"{files} files of weights written in " in whole
    bare = succeeded(convert.run(*arguments, "model.mtp_depths=0", f"output={tmp_path / 'bare'}")).out
    last = sum("layers.3." in name and not name.endswith("_scale_inv") for name in stored)
    assert last > 2
    assert f"{last} tensors left out, which the model does not have" in bare
