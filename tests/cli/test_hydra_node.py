"""Hydra's own node: what acts is passed on, everything else is refused and leaves nothing behind."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import hydra.conf
import pytest

from dsv3.cli.hydra_node import _ACTS, _INSTEAD, _SWEEPS, refuse_hydra_overrides
from dsv3.errors import UserError
from tests.harness.commands import ConvertCommand, PlannedCommand

pytestmark = pytest.mark.slow

GROUPS = [
    f"hydra/{folder.name}"
    for folder in (Path(hydra.conf.__file__).parent / "hydra").iterdir()
    if folder.is_dir()
]


def _leaves(node: Any, prefix: str) -> Iterator[str]:
    hints = get_type_hints(node)
    for field in fields(node):
        kind, key = hints[field.name], f"{prefix}.{field.name}"
        if is_dataclass(kind):
            yield from _leaves(kind, key)
        else:
            yield key


def _refusal(argument: str, program: str) -> str | None:
    try:
        refuse_hydra_overrides([argument, "-m"], program)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("program", ["train", "convert"])
def test_every_key_that_hydra_has_acts_or_is_refused(program: str) -> None:
    keys = [*_leaves(hydra.conf.HydraConf, "hydra"), *GROUPS]
    assert len(keys) > 30
    acting = []
    for key in keys:
        for argument in (f"{key}=x", f"+{key}=x", f"++{key}=x", f"~{key}"):
            refusal = _refusal(argument, program)
            if refusal is None:
                acting.append(key)
            else:
                assert refusal.startswith(key)
                assert len(refusal) > len(key) + 30
    sweeps = {"hydra.launcher", "hydra.sweeper"} if program == "train" else set()
    always = {"hydra.searchpath", "hydra.callbacks", "hydra.job.env_set", "hydra.job.env_copy"}
    assert set(acting) == sweeps | always


REFUSED = {
    "hydra.run.dir=x": ("run.dir=DIR", "output=DIR"),
    "hydra.sweep.dir=x": ("run.dir=DIR", "run.dir=DIR"),
    "hydra.sweep.subdir=x": ("numbered", "numbered"),
    "hydra.mode=MULTIRUN": ("-m makes a sweep", "-m"),
    "hydra.output_subdir=.hydra": ("run.dir=DIR", "output=DIR"),
    "hydra.job.chdir=true": ("run.dir=DIR", "output=DIR"),
    "hydra.job.name=x": ("logger.name=NAME", "run.dir=DIR"),
    "hydra.verbose=true": ("HYDRA_FULL_ERROR=1", "HYDRA_FULL_ERROR=1"),
    "hydra/job_logging=default": ("log.txt", "log.txt"),
    "hydra.job_logging.level=DEBUG": ("log.txt", "log.txt"),
    "hydra/launcher=joblib": ("add -m", "is for sweeps"),
    "hydra.sweeper.n_trials=3": ("add -m", "is for sweeps"),
    "hydra.nothing=3": ("hydra.searchpath", "hydra.searchpath"),
}


@pytest.mark.parametrize("typed", REFUSED)
def test_a_key_that_would_do_nothing_is_refused_and_leaves_no_directory(
    planned: PlannedCommand, convert: ConvertCommand, typed: str
) -> None:
    for command, arguments, words in zip(
        (planned, convert), (["logger=none"], ["direction=hf_to_dcp"]), REFUSED[typed], strict=True
    ):
        outcome = command.run(*arguments, typed)
        assert outcome.code == 2
        assert outcome.err.startswith(f"error: {typed.partition('=')[0]} ")
        assert words in outcome.err
        assert len(outcome.err.splitlines()) == 1
    assert not list(Path.cwd().iterdir())


def test_variables_of_the_environment_reach_the_job(
    planned: PlannedCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    seen: list[str | None] = []

    def look(job: object) -> None:
        import os

        seen.append(os.environ.get("NAMED"))

    monkeypatch.setattr("tests.harness.commands.check", look)
    assert planned.run("task=plan", "+hydra.job.env_set.NAMED=x").code == 0
    assert seen == ["x"]


@pytest.mark.parametrize("folder", ["{absolute}", "mine"])
def test_a_folder_of_the_search_path_is_used_and_remembered_by_its_place(
    planned: PlannedCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "mine.yaml").write_text("defaults: [debug, _self_]\nnum_layers: 3\n")
    monkeypatch.chdir(tmp_path)
    place = folder.format(absolute=tmp_path / "mine")
    job = planned.run("task=plan", "model=mine", f"hydra.searchpath=[file://{place}]").job
    assert job.config.model.num_layers == 3
    assert job.config_dirs == [str(tmp_path / "mine")]


def test_the_table_names_keys_that_hydra_has() -> None:
    keys = [*_leaves(hydra.conf.HydraConf, "hydra"), *GROUPS]
    for name in [*_INSTEAD, *_SWEEPS, *_ACTS]:
        plugin_group = name.startswith("hydra/") and name not in GROUPS
        assert plugin_group or any(key.startswith(name) for key in keys), name
