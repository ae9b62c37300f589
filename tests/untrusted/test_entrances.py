"""Pipes, devices, folders and loops in the place of each file, and hostile texts in it, at every entrance.

Each is refused in a line or taken for a missing file. Nothing waits, nothing is a traceback.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.errors import HydraException

from dsv3.checkpoint.dcp_metadata import load_tensors, read_metadata
from dsv3.checkpoint.directory import Progress, promises_manifest
from dsv3.checkpoint.manifest import read_manifest, verify
from dsv3.checkpoint.training_record import TrainingRecord, weights_identity
from dsv3.cli.user_files import UserFiles
from dsv3.config.overrides import compose
from dsv3.config.root import Config
from dsv3.config.strict import to_yaml
from dsv3.convert.hf_assets import asset_warnings, read_import_metadata, require_assets
from dsv3.errors import UserError
from dsv3.hf.config_json import model_from_hf
from dsv3.hf.safetensors_reader import read_headers
from dsv3.launch.checkpoint_defaults import described_model
from dsv3.launch.resume import ResumedRun
from dsv3.launch.run_dir import read_origin, read_stored_values
from dsv3.launch.run_results import read_run
from dsv3.launch.trained_on import run_record
from dsv3.metrics.jsonl import read_rows, read_whole_lines, truncate_after
from tests.config.test_limits import base
from tests.convert.releases import small_model, write_release
from tests.harness.composing import store_uncopied
from tests.harness.tiny import model_config
from tests.harness.trained import Trained
from tests.untrusted.special_files import KINDS, PRESENT, make, no_hang
from tests.untrusted.test_untrusted_files import LAUGHS

Read = Callable[[Path], Any]


def _load(step: Path) -> None:
    name = "model.embedding.weight"
    metadata: Any = read_metadata(step)
    load_tensors(step, {name: torch.zeros(metadata.state_dict_metadata[name].size)})


def _check_presets(folder: Path) -> None:
    """Choose model=own of a --config-dir as train.py does, before Hydra."""
    UserFiles(["model=own"], folder).check()


def _compose_presets(folder: Path) -> None:
    """Let Hydra choose it behind train.py's back; the command line explains Hydra's own errors."""
    with store_uncopied(), suppress(HydraException, yaml.YAMLError, UnicodeDecodeError):
        compose(["model=own"], [f"file://{folder}"])


RUN: dict[str, list[Read]] = {
    "config.yaml": [
        ResumedRun.read,
        run_record,
        lambda run: read_run(run, "name"),
        lambda run: read_stored_values(run / "config.yaml"),
    ],
    "overrides.yaml": [ResumedRun.read, lambda run: read_run(run, "name"), read_origin],
    "environment.json": [ResumedRun.read, run_record, lambda run: read_run(run, "name"), read_origin],
    "log.txt": [ResumedRun.read],
    "metrics.jsonl": [
        lambda run: read_run(run, "name"),
        lambda run: read_rows(run / "metrics.jsonl"),
        lambda run: truncate_after(run / "metrics.jsonl", 1),
        lambda run: read_whole_lines(run / "metrics.jsonl"),
    ],
}
"""By file of a run directory, what reads it."""

STEP: dict[str, list[Read]] = {
    ".metadata": [read_metadata, _load, verify],
    "__0_0.distcp": [_load, verify, lambda step: weights_identity(str(step))],
    "state.json": [Progress.read, promises_manifest, verify],
    "manifest.json": [read_manifest, verify, described_model, lambda step: weights_identity(str(step))],
    "model.yaml": [described_model, verify],
    "training.yaml": [TrainingRecord.read, lambda step: weights_identity(str(step))],
}
"""By file of a checkpoint."""

RELEASE: dict[str, list[Read]] = {
    "config.json": [model_from_hf, described_model],
    "hf_quant_config.json": [model_from_hf],
    "generation_config.json": [require_assets, lambda folder: asset_warnings(folder, small_model())],
    "tokenizer_config.json": [require_assets, lambda folder: asset_warnings(folder, small_model())],
    "anything.json": [require_assets, lambda folder: asset_warnings(folder, small_model())],
    "model.safetensors": [read_headers],
    "model.safetensors.index.json": [read_headers],
    "hf/import.json": [read_import_metadata],
}
"""By file of a HuggingFace directory."""

PRESETS: dict[str, list[Read]] = {"model/own.yaml": [_check_presets, _compose_presets]}
"""By file of a --config-dir."""

ENTRANCES = [
    (kind, file, number)
    for kind, files in {"run": RUN, "step": STEP, "release": RELEASE, "presets": PRESETS}.items()
    for file, reads in files.items()
    for number in range(len(reads))
]

HOSTILE: dict[str, bytes] = {
    "laughs": LAUGHS.encode(),
    "deep JSON": b"[" * 100_000,
    "deep mapping": b'{"a":' * 100_000,
    "deep YAML": b"- " * 100_000,
    "a long number": b'{"a": ' + b"9" * 5000 + b"}",
    "no UTF-8": b"\xff\xfe\x00",
    "a value that does not suit its tag": b"{a: !!bool maybe}",
    "a number without digits": b"{a: 0x_}",
    "nothing": b"",
    "zeros": b"\0" * 4096,
    "null": b"null",
    "a list": b"[1, 2]",
    "infinities": b'{"step": 1e999, "tokens": NaN, "model": {}, "schedule": {"total_steps": 1e999}}',
    "keys of all kinds": b'{"a": {"b": [{"c": null}]}, "weight_map": {"x": 1}, "files": [], "data": []}',
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write a sound directory of each kind, to be copied."""
    root = tmp_path_factory.mktemp("sources")
    run = root / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(to_yaml(_config())))
    (run / "overrides.yaml").write_text("- task=plan\n")
    (run / "environment.json").write_text(json.dumps({"git_commit": None, "data": {}}))
    (run / "metrics.jsonl").write_text('{"step": 1, "tokens": 2}\n')
    step = Trained(seed=0).save(root / "trained")
    write_release(root / "release", small_model())
    presets = root / "presets" / "model"
    presets.mkdir(parents=True)
    (presets / "own.yaml").write_text("defaults: [debug]\nnum_layers: 3\n")
    return {"run": run, "step": step, "release": root / "release", "presets": presets.parent}


@cache
def _config() -> Config:
    from dataclasses import replace

    config = replace(base("debug"), model=model_config())
    return replace(config, schedule=replace(config.schedule, total_steps=10))


def _tried(read: Read, folder: Path) -> None:
    """Let a reader read; it may give something back or raise a UserError of a line or two."""
    told = ""
    try:
        with no_hang():
            read(folder)
    except UserError as error:
        told = str(error)
    assert len(told) < 500 + 3 * len(str(folder)), told
    assert len(told.splitlines()) <= 2, told


@pytest.mark.parametrize(("kind", "file", "number"), ENTRANCES)
def test_every_file_may_be_anything(
    kind: str, file: str, number: int, sources: dict[str, Path], tmp_path: Path
) -> None:
    read = {"run": RUN, "step": STEP, "release": RELEASE, "presets": PRESETS}[kind][file][number]
    for name in (*PRESENT, *HOSTILE):
        folder = tmp_path / name.replace(" ", "-")
        shutil.copytree(sources[kind], folder)
        path = folder / file
        path.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True)
        if name in HOSTILE:
            path.write_bytes(HOSTILE[name])
        else:
            make(path, name)
        _tried(read, folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize(("kind", "file", "number"), ENTRANCES)
def test_the_sound_directories_are_read(kind: str, file: str, number: int, sources: dict[str, Path]) -> None:
    """Or the test above would show nothing."""
    read = {"run": RUN, "step": STEP, "release": RELEASE, "presets": PRESETS}[kind][file][number]
    if file != "training.yaml":
        read(sources[kind])


@pytest.mark.parametrize("value", ["!!timestamp x", "!!bool maybe", "!!int '-'", "0x_"])
@pytest.mark.parametrize("read", [_check_presets, _compose_presets])
def test_a_preset_is_named_with_the_line_of_such_a_value(
    read: Read, value: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(sources["presets"], tmp_path / "presets")
    with (folder / "model" / "own.yaml").open("a") as file:
        file.write(f"dim: {value}\n")
    with pytest.raises(UserError, match=r"own\.yaml:3: (has the tag|is not YAML: '.*' is no) !!"):
        read(folder)


@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "link to a pipe", "loop"])
def test_a_run_in_which_nothing_can_be_written_is_not_resumed(
    kind: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(sources["run"], tmp_path / "run")
    make(tmp_path / "run" / "log.txt", kind)
    with pytest.raises(UserError, match=rf"log\.txt {KINDS[kind]}"):
        ResumedRun.read(tmp_path / "run")


@pytest.mark.parametrize(
    "steps", [".inf", "-.inf", ".nan", "1.0e+30", "0", "-5", str(2**63), "'10'", "[10]", "true"]
)
def test_a_stored_number_of_steps_is_a_whole_one(
    steps: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(sources["run"], tmp_path / "run")
    file = tmp_path / "run" / "config.yaml"
    config = yaml.safe_load(file.read_text())
    config["schedule"]["total_steps"] = yaml.safe_load(steps)
    file.write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"schedule\.total_steps=.* must be a whole number from 1 to"):
        ResumedRun.read(tmp_path / "run")
