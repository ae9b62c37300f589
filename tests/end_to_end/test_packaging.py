"""The wheel is the whole program: commands, configs and library, without the checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.processes import ROOT, CommandLine, rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel of this tree installed, its dependencies left out."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("dsv3", "conf", "experiments"):
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # The interpreter's own setuptools builds it: a build of its own would need the network.
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--no-index", "--target", target, source], check=True, capture_output=True)
    shutil.rmtree(source)
    return target


def run(installed: Path, command_line: CommandLine, *command: str | Path) -> str:
    """Run a command that finds the installed package first; it must succeed. Return its stdout."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=command_line.directory,
        env={**command_line.environment, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_commands_plan_train_on_workers_and_name_themselves(
    installed: Path, command_line: CommandLine
) -> None:
    program = installed / "bin" / "dsv3-train"
    planned = run(
        installed, command_line, program, "task=plan", "task.format=json", "model=671b", "parallel=tp_ep"
    )
    assert json.loads(planned)["parameters"] == 682_636_472_320
    run_dir = command_line.directory / "run"
    trained = command_line.training(
        run_dir, "parallel=fsdp", "launch.nproc=2", "train.steps=2", "train.stop_after=1"
    )
    said = run(installed, command_line, program, *trained)
    assert f"dsv3-train resume={run_dir}" in said + (run_dir / "log.txt").read_text()
    assert run(installed, command_line, program, f"resume={run_dir}") is not None
    assert [row["step"] for row in rows(run_dir)] == [1, 2]
    assert "usage: dsv3-convert" in run(installed, command_line, installed / "bin" / "dsv3-convert", "--help")


def test_the_examples_of_the_library_page_work(installed: Path, command_line: CommandLine) -> None:
    first, second = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(), re.S)
    assert len(first.splitlines()) < 10
    where = "import dsv3; print(dsv3.__file__)"
    printed = run(installed, command_line, sys.executable, "-c", f"{first}\n{where}")
    assert printed.splitlines() == ["torch.Size([1, 3, 4096])", os.fspath(installed / "dsv3" / "__init__.py")]
    run_dir = command_line.directory / "outputs" / "my-run"
    run(
        installed,
        command_line,
        installed / "bin" / "dsv3-train",
        *command_line.training(run_dir, "train.steps=1"),
    )
    same = "print(sum(p.numel() for p in model.parameters()))"
    assert int(run(installed, command_line, sys.executable, "-c", f"{second}\n{same}")) > 0
