"""A layout that cannot fit is refused before anything is started: soon, with the numbers, without torch."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 3.0
"""Of the processor, so that other work on the machine does not count."""


def refused(directory: Path, arguments: list[str]) -> list[str]:
    """What train.py says on stderr, last the heavy modules that it has imported."""
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['train.py', *{arguments!r}]\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    print(end.code, sorted({'torch', 'numpy', 'transformers', 'wandb'} & set(sys.modules)))\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=directory,
        env={"PYTHONPATH": str(ROOT), "DSV3_PROGRESS": "off"},
        capture_output=True,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < SECONDS
    assert done.stdout.split(maxsplit=1) == ["2", "[]\n"]
    assert not list(directory.iterdir())
    return done.stderr.splitlines()


@pytest.mark.parametrize(
    ("preset", "ranks"), [("tp_ep", 256), ("pp", 1024), ("fsdp", 512), ("cp", 512), ("full", 512)]
)
def test_671b_says_what_it_needs_on_a_machine_that_cannot_have_it(
    tmp_path: Path, preset: str, ranks: int
) -> None:
    layout = ["model=671b", f"parallel={preset}", "hardware=cpu", "hardware.memory_bytes=24_000_000_000"]
    first, second = refused(tmp_path, layout)
    assert first.startswith(
        f"error: 682,636,472,320 parameters on {ranks:,} ranks of hardware=cpu do not fit"
    )
    assert "has 22.35 GiB" in first
    assert " fit" in second


def test_what_is_found_of_this_machine_is_told_too(tmp_path: Path) -> None:
    first, _ = refused(tmp_path, ["model=671b", "parallel=tp_ep", "hardware=cpu", "recompute=full"])
    assert "do not fit: a rank needs " in first
