"""A disk that is full, or read-only, ends a command in a line, wherever it is in its start."""

import errno
import os
import shutil
from pathlib import Path

from dsv3.errors import UserError, refused_by_system
from tests.faults.full_disk import full_disk
from tests.harness.commands import TrainCommand
from tests.harness.outcome import Outcome, refused
from tests.harness.tiny import MODEL, TRAINING


def test_the_disk_is_full_somewhere_in_the_start_of_a_run(commands: TrainCommand, tmp_path: Path) -> None:
    root = tmp_path / "disk"

    def train() -> Outcome:
        steps = ["train.steps=1", "train.microbatch_size=4", "train.checkpoint_every=1"]
        places = [f"data.path={commands.text}", f"run.dir={root}/run", f"data.cache_dir={root}/cache"]
        return commands.run(*MODEL, *TRAINING, *steps, "data=text", *places)

    root.mkdir()
    with full_disk(root, None) as disk:
        assert train().code == 0
    made = [path.removeprefix(str(root)) for path in disk.made]
    begun = made.index("/run/metrics.jsonl")
    # One place in each stage: the run's lock, the scan, the tokens, the files that describe it, its rows.
    stages = ["/run/.lock", "/cache/.corpus-", "/cache/.tokens-", "/run/.partial-config.yaml"]
    stages.append("/run/metrics.jsonl")
    for number, stage in enumerate(stages):
        place = next(place for place in range(begun + 1) if made[place].startswith(stage))
        shutil.rmtree(root)
        root.mkdir()
        code = errno.EROFS if number % 3 == 2 else errno.ENOSPC
        with full_disk(root, place, code):
            outcome = train()
        assert "step 1/1" not in outcome.out
        refused(Outcome(outcome.code, "", outcome.err))
        assert os.strerror(code) in outcome.err or "run.dir=" in outcome.err


def test_errors_of_the_system_are_told_as_mistakes() -> None:
    def told(error: OSError) -> str:
        return str(refused_by_system(error))

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/b")
    assert told(full) == "/a/b cannot be written (No space left on device): make room, and repeat the command"
    copied = shutil.Error([("x", "/a/c", str(full)), ("y", "/a/d", str(full))])
    assert told(copied).startswith("/a/c cannot be written (No space left on device)")
    assert "Read-only file system" in told(OSError(errno.EROFS, os.strerror(errno.EROFS), b"/a"))
    assert told(OSError(errno.EDQUOT, "Quota exceeded")).startswith("a file cannot be written")
    for other in (FileNotFoundError(errno.ENOENT, "No such file"), ValueError("x"), UserError("x")):
        assert refused_by_system(other) is None
