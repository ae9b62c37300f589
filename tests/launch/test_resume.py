"""A resumed run is the run: its own values serve; what would have changed is told, with its kind."""

import json
from pathlib import Path

import pytest
import yaml

from dsv3.checkpoint.directory import CONFIG_FILE, ENVIRONMENT_FILE
from dsv3.launch.job import Job
from tests.harness.commands import PlannedCommand
from tests.harness.runs import StoredRun

pytestmark = pytest.mark.slow


def notes(job: Job, start: str) -> str:
    """Return the one note that begins so."""
    (note,) = [note for note in job.notes if note.startswith(start)]
    return note.removeprefix(start)


def test_a_file_that_has_changed_since_does_not_change_the_run(
    planned: PlannedCommand, stored: StoredRun
) -> None:
    """An experiment, a preset, a default of a schema: all are the values that the files give today."""
    directory = stored.store("logger=none", "optimizer.eps=1e-7")
    stored.change(optimizer__lr=0.02, train__log_every=7, optimizer__eps=1e-6)
    job = planned.run(f"resume={directory}").job
    assert (job.config.optimizer.lr, job.config.train.log_every) == (0.02, 7)
    assert notes(job, "taken from the run, what is learnt: ") == (
        "optimizer.lr=0.02 (the files say 0.003 now), optimizer.eps=1e-06 (the files say 1e-07 now)"
    )
    assert (
        notes(job, "taken from the run, only how it is computed: ")
        == "train.log_every=7 (the files say 20 now)"
    )


def test_an_untouched_run_is_resumed_without_a_word(planned: PlannedCommand, stored: StoredRun) -> None:
    assert planned.run(f"resume={stored.store('logger=none', 'parallel=fsdp')}").job.notes == []


def test_a_run_that_cannot_be_written_is_not_told_to_take_another_directory(
    planned: PlannedCommand, stored: StoredRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a read-only disk: a resume has no other directory, so `name another` would lead nowhere."""
    directory = stored.store("logger=none")
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != directory)
    refused = planned.run(f"resume={directory}")
    assert refused.code == 2
    assert f"resume={directory} is not writable, and a run goes on in its own" in refused.err
    assert f"checkpoint.load={directory} begins a new run" in refused.err
    assert len(refused.err.strip().splitlines()) == 1


def test_what_is_typed_is_told_with_its_kind(planned: PlannedCommand, stored: StoredRun) -> None:
    directory = stored.store("logger=none", "train.microbatch_size=4")
    job = planned.run(f"resume={directory}", "optimizer.lr=1e-3", "train.microbatch_size=2").job
    assert notes(job, "changes what is learnt: ") == "optimizer.lr 0.003 -> 0.001"
    assert notes(job, "changes only how it is computed: ") == "train.microbatch_size 4 -> 2"
    assert not [note for note in job.notes if note.startswith("taken")]


def test_another_layout_is_told_as_one_choice_and_a_node_as_one_entry(
    planned: PlannedCommand, stored: StoredRun
) -> None:
    directory = stored.store("logger=none")
    (directory / ENVIRONMENT_FILE).write_text(json.dumps({"choices": {"parallel": "none"}}))
    job = planned.run(f"resume={directory}", "parallel=fsdp").job
    told = notes(job, "changes only how it is computed: ")
    assert told.startswith("parallel none -> fsdp")
    assert not [word for word in ("_target_", "absent", "null") if word in told]
    assert len(told) < 110
    directory = stored.store("logger=none", "parallel=fsdp", "run.dir=other")
    told = notes(planned.run(f"resume={directory}", "parallel.context=null").job, "changes only how it is ")
    assert told == "computed: parallel.context on -> null"


def test_a_longer_run_is_told_as_how_far_it_goes(planned: PlannedCommand, stored: StoredRun) -> None:
    job = planned.run(f"resume={stored.store('logger=none', 'train.steps=30')}", "train.steps=50").job
    assert notes(job, "changes only how far it goes: ") == "train.steps 30 -> 50"
    assert not [note for note in job.notes if note.startswith("changes only how it is computed")]


def test_a_group_that_is_typed_brings_its_own_values_but_the_schedules_end(
    planned: PlannedCommand, stored: StoredRun
) -> None:
    directory = stored.store("logger=none", "schedule=wsd", "schedule.decay=0.5", total_steps=400)
    job = planned.run(f"resume={directory}", "schedule=wsd").job
    assert vars(job.config.schedule)["decay"] == 0.2
    assert job.config.schedule.total_steps == 400
    assert notes(job, "changes what is learnt: ") == "schedule.decay 0.5 -> 0.2"


def test_a_typed_layout_is_that_of_the_runs_model(planned: PlannedCommand, stored: StoredRun) -> None:
    directory = stored.store("model=16b", "logger=none", "precision=bf16")
    (directory / ENVIRONMENT_FILE).write_text('{"choices": {"model": "16b"}}')
    config = planned.run(f"resume={directory}", "parallel=fsdp", "hardware=h200", "recompute=full").job.config
    assert config.parallel.min_world_size > 1
    assert config.optimizer.lr == 4.2e-4


def test_a_planted_name_of_a_choice_leads_to_no_file(
    planned: PlannedCommand, stored: StoredRun, tmp_path: Path
) -> None:
    """The names stand in Hydra's defaults list, where a path would lead to a file that sets anything."""
    (tmp_path / "planted-fsdp.yaml").write_text("# @package _global_\noptimizer: {lr: 7}\n")
    directory = stored.store("logger=none")
    up = "../" * 12
    (directory / ENVIRONMENT_FILE).write_text(json.dumps({"choices": {"model": f"{up}{tmp_path}/planted"}}))
    assert planned.run(f"resume={directory}", "parallel=fsdp").job.config.optimizer.lr == 3e-3


def test_values_that_suit_the_layout_are_found_anew(planned: PlannedCommand, stored: StoredRun) -> None:
    """Eight sequences are a microbatch on one rank, and do not fit on four."""
    directory = stored.store("logger=none", "train.sequence_length=64")
    assert yaml.safe_load((directory / CONFIG_FILE).read_text())["train"]["microbatch_size"] == 8
    job = planned.run(f"resume={directory}", "parallel=fsdp", "launch.nproc=4").job
    assert job.config.train.microbatch_size == 2
    assert job.config.train.global_batch_size == 8


def test_a_learnt_value_that_was_filled_in_stays(planned: PlannedCommand, stored: StoredRun) -> None:
    directory = stored.store("logger=none", "train.sequence_length=64", "train.global_batch_size=16")
    found = {"filled_in": ["train.global_batch_size", "train.microbatch_size"]}
    (directory / ENVIRONMENT_FILE).write_text(json.dumps(found))
    job = planned.run(f"resume={directory}", "parallel=fsdp", "launch.nproc=4").job
    assert job.config.train.global_batch_size == 16


def test_keys_that_the_run_lacks_take_the_default_of_today_and_are_told_where_learnt(
    planned: PlannedCommand, stored: StoredRun
) -> None:
    directory = stored.store("logger=none")
    stored.change(optimizer__no_decay=None, checkpoint__keep_best=None)
    job = planned.run(f"resume={directory}").job
    assert job.notes == ["newer than the run, with the defaults of today: optimizer.no_decay=[*norm.weight]"]


def test_keys_that_today_lacks_are_told_or_refused_where_learnt(
    planned: PlannedCommand, stored: StoredRun
) -> None:
    directory = stored.store("logger=none")
    stored.change(parallel__overlap=3)
    assert notes(planned.run(f"resume={directory}").job, "not known to this version and left out: ") == (
        "parallel.overlap=3"
    )
    stored.change(optimizer__warp=3)
    refused = planned.run(f"resume={directory}")
    assert refused.code == 2
    assert "has optimizer.warp=3, which this version of dsv3 does not know" in refused.err


def test_a_value_that_is_not_possible_today_is_named(planned: PlannedCommand, stored: StoredRun) -> None:
    directory = stored.store("logger=none")
    stored.change(precision__compute="fp12")
    refused = planned.run(f"resume={directory}")
    assert refused.code == 2
    assert "what config.yaml says of precision is not possible" in refused.err
    assert len(refused.err.splitlines()) == 1
    assert planned.run(f"resume={directory}", "precision=fp32").code == 0


def test_other_code_is_told_in_a_line(
    planned: PlannedCommand, stored: StoredRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = stored.store("logger=none")
    monkeypatch.setattr("dsv3.launch.resume.git_commit", lambda: "b" * 40 + "+changes")
    (directory / ENVIRONMENT_FILE).write_text(json.dumps({"git_commit": "a" * 40}))
    assert planned.run(f"resume={directory}").job.notes == [
        f"other code: the run was trained by commit {'a' * 12}, this is {'b' * 12} with changes"
    ]


def test_what_a_run_keeps_is_refused_but_its_kernel_may_change(
    planned: PlannedCommand, stored: StoredRun
) -> None:
    directory = stored.store("logger=none")
    job = planned.run(f"resume={directory}", "model.attention.kernel=sdpa").job
    assert notes(job, "changes only how it is computed: ") == "model.attention.kernel auto -> sdpa"
    assert planned.run(f"resume={directory}", "model=hf").job.config.model.dim == job.config.model.dim
    refused = planned.run(f"resume={directory}", "model.dim=64")
    assert refused.code == 2
    assert "a run keeps its model and its data" in refused.err


class Folder:
    """A folder of --config-dir with a study, and a run that was started with it."""

    def __init__(self, folder: Path, stored: StoredRun) -> None:
        self.study = folder / "experiments" / "mine.yaml"
        self.study.parent.mkdir(parents=True)
        self.write("optimizer: {lr: 0.01}")
        self.directory = stored.store("logger=none", "experiments=mine")
        stored.change(optimizer__lr=0.01)
        environment = {"config_dirs": [str(folder)], "choices": {"experiments": "mine"}}
        (self.directory / ENVIRONMENT_FILE).write_text(json.dumps(environment))

    def write(self, values: str) -> None:
        self.study.write_text(f"# @package _global_\n{values}\n")


@pytest.fixture
def folder(tmp_path: Path, stored: StoredRun) -> Folder:
    """A run of a study in a folder of its own."""
    return Folder(tmp_path / "lab", stored)


def test_the_run_remembers_its_config_dir(planned: PlannedCommand, folder: Folder) -> None:
    job = planned.run(f"resume={folder.directory}").job
    assert job.config.optimizer.lr == 0.01
    assert job.notes == []
    assert job.config_dirs == [str(folder.study.parents[1])]
    assert job.choices["experiments"] == "mine"
    assert "experiments=mine" in job.overrides


def test_a_study_of_the_folder_that_has_changed_is_told(planned: PlannedCommand, folder: Folder) -> None:
    folder.write("optimizer: {lr: 0.5}")
    job = planned.run(f"resume={folder.directory}").job
    assert job.config.optimizer.lr == 0.01
    assert job.notes == ["taken from the run, what is learnt: optimizer.lr=0.01 (the files say 0.5 now)"]
    typed = planned.run(
        f"resume={folder.directory}", f"--config-dir={folder.study.parents[1]}", "experiments=mine"
    )
    assert typed.job.config.optimizer.lr == 0.5
    assert typed.job.notes == ["changes what is learnt: optimizer.lr 0.01 -> 0.5"]


def test_a_folder_that_is_gone_is_told_and_the_runs_own_values_serve(
    planned: PlannedCommand, folder: Folder
) -> None:
    home = folder.study.parents[1]
    folder.study.unlink()
    job = planned.run(f"resume={folder.directory}").job
    assert job.config.optimizer.lr == 0.01
    (note,) = job.notes
    assert note.startswith("the files of today do not give this run (")
    home.rename(home.with_name("moved"))
    gone, _ = planned.run(f"resume={folder.directory}").job.notes
    assert gone == f"--config-dir={home} is gone: the run's own values serve"


def test_a_remembered_folder_runs_nothing(planned: PlannedCommand, folder: Folder, tmp_path: Path) -> None:
    """Its files may set Hydra's own node: composed as data, its callbacks are never made."""
    callbacks = f"hydra: {{callbacks: {{x: {{_target_: pathlib.Path.touch, self: {tmp_path}/ran}}}}}}"
    folder.write(f"optimizer: {{lr: 0.01}}\n{callbacks}")
    layouts = folder.study.parents[1] / "layouts"
    layouts.mkdir()
    (layouts / "debug-stored.yaml").write_text(f"# @package _global_\n{callbacks}\n")
    assert planned.run(f"resume={folder.directory}").job.config.optimizer.lr == 0.01
    assert not list(tmp_path.rglob("ran"))
