"""Sweeps: their directories, and the jobs that fail in them."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from dsv3.launch.sweep import Sweep, mark_failed, read_failure
from tests.harness.commands import PlannedCommand


def test_the_directory_of_a_sweep_is_set_by_run_dir_alone(planned: PlannedCommand) -> None:
    HydraConfig.instance().cfg = None  # what another test composed
    outcome = planned.run("-m", "task=plan", "train.steps=1,2", "hydra.sweep.dir=elsewhere")
    assert outcome.code == 2
    assert "run.dir=DIR" in outcome.err
    for arguments in (["train.steps=0,1"], ["train.steps=1,2"]):  # an earlier failure is not this one's
        outcome = planned.run("-m", "task=plan", "run.dir=sweep", *arguments)
        assert outcome.code == ("0" in arguments[0])
    assert json.loads(Path("sweep/0/failed.json").read_text())["overrides"][-1] == "train.steps=0"
    assert HydraConfig.instance().cfg is None


def test_two_sweeps_in_one_second_have_two_directories(here: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        chosen = list(threads.map(lambda _: Sweep(arguments=["-m"]).choose(None), range(24)))
    assert len(set(chosen)) == 24
    assert {str(path) for path in Path("multirun").iterdir()} == set(chosen)


def test_more_failures_than_are_shown_are_counted(tmp_path: Path) -> None:
    made = Sweep()
    assert made.choose(str(tmp_path)) == made.choose(None) == str(tmp_path)
    assert made.failure() is None
    for number in range(12):
        mark_failed(tmp_path / str(number), f"reason {number}", ["train.steps=0", "data.path=here"])
    first, *reasons = str(made.failure()).splitlines()
    assert first.startswith(f"jobs {', '.join(map(str, range(12)))} of {tmp_path}")
    assert reasons[4:] == ["job 4: reason 4", "and 7 more: failed.json in each tells why"]
    assert Sweep().failure() is None
    later = Sweep()
    later.choose(str(tmp_path))
    assert later.failure() is None


def test_a_damaged_mark_has_no_reason(tmp_path: Path) -> None:
    assert read_failure(tmp_path) == ("", [])
    (tmp_path / "failed.json").write_text("[1")
    assert read_failure(tmp_path) == ("", [])
