import re
from pathlib import Path

import pytest
import yaml

from dsv3.config.strict import strict, to_yaml
from dsv3.launch.job import plan_job
from dsv3.launch.run_dir import CONFIG_FILE, OVERRIDES_FILE
from tests.composing import compose
from tests.end_to_end.fixtures import command_line, prepared
from tests.launch.commands import Commands

__all__ = ["command_line", "commands", "prepared", "stored"]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Commands:
    """train.py without its workers, started in an empty directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("sys.argv", ["train.py"])
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_STEP_ID"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PYTHONPATH", "")  # a sweep sets it
    return Commands(capsys)


class StoredRun:
    """A directory that looks like a run: what `resume=` reads of one."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def store(self, *overrides: str, total_steps: int = 300) -> Path:
        """Write the run's files; its directory."""
        self.directory.mkdir(parents=True, exist_ok=True)
        foreign = re.compile(
            r"[+]*(run|hydra|checkpoint|experiments)|[-~]|\d|.*_target_"
        )  # not for a config of ours
        kept = [override for override in overrides if not foreign.match(str(override))]
        config = to_yaml(plan_job(strict(compose(kept)), kept).config)
        config["schedule"]["total_steps"] = total_steps
        (self.directory / CONFIG_FILE).write_text(yaml.safe_dump(config))
        (self.directory / OVERRIDES_FILE).write_text(yaml.safe_dump(list(overrides)))
        return self.directory


@pytest.fixture
def stored(tmp_path: Path) -> StoredRun:
    return StoredRun(tmp_path / "a run, it's = $HOME (1) [x]")
