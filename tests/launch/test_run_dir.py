"""A run directory takes one run, and keeps the checkpoints of another."""

from pathlib import Path
from typing import cast

import pytest

from dsv3.config.root import Config
from dsv3.config.strict import strict
from dsv3.errors import UserError
from dsv3.launch.job import Job, plan_job
from dsv3.launch.run_dir import check_run_dir, check_same_run, make_run_dir
from dsv3.launch.sweep import Sweep
from tests.harness.composing import compose


def a_job(*overrides: str) -> Job:
    return plan_job(cast(Config, strict(compose(list(overrides)))), list(overrides))


def test_two_runs_of_one_second_get_two_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = a_job()
    first, second, third = (make_run_dir(job) for _ in range(3))
    assert len({first, second, third}) == 3
    assert second.name == f"{first.name}_2"


def test_a_fresh_run_does_not_resume_from_checkpoints_that_lost_their_run(tmp_path: Path) -> None:
    job = a_job(f"run.dir={tmp_path}")
    for number in (1, 2):
        (tmp_path / "checkpoints" / "step-9").mkdir(parents=True)
        assert make_run_dir(job) == tmp_path
        assert not (tmp_path / "checkpoints").exists()
        assert (tmp_path / f"checkpoints-before-{number}" / "step-9").is_dir()


def test_the_checkpoints_of_a_run_stay_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-9").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text("model: {}")
    make_run_dir(a_job(f"run.dir={tmp_path}"))
    assert (tmp_path / "checkpoints" / "step-9").is_dir()


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/run"):
        make_run_dir(a_job(f"run.dir={tmp_path}/file/run"))


@pytest.mark.parametrize("text", ["[1]", "{", "model: 3", ""])
def test_a_config_that_holds_no_model_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml"):
        check_same_run(a_job().config, tmp_path)


@pytest.mark.parametrize("name", ["index.json", ".metadata", "config.json", "config.yaml"])
def test_no_run_and_no_sweep_begins_in_what_another_command_has_written(tmp_path: Path, name: str) -> None:
    output = tmp_path / "output"
    output.mkdir()
    (output / name).write_text("{}")
    with pytest.raises(UserError, match=rf"run\.dir={output} holds "):
        check_run_dir(output, resume=False)
    sweep = Sweep(arguments=["train.steps=1,2"])
    with pytest.raises(UserError, match=rf"run\.dir={output} holds "):
        sweep.choose(str(output))
    assert sweep.refused is not None
    assert [path.name for path in output.iterdir()] == [name]
    if name != "config.yaml":
        with pytest.raises(UserError) as error:
            check_run_dir(output, resume=False)
        check_run_dir(Path(str(error.value).rpartition("run.dir=")[2]), resume=False)
