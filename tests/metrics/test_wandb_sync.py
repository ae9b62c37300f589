"""A resumed offline run is one run for `wandb sync`, whose uploads go to a server of this process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3.config.logger import WandbMode
from dsv3.metrics.row import MetricsRow
from dsv3.metrics.wandb import WandbLogger, run_id
from tests.metrics.wandb_server import WandbServer

pytestmark = pytest.mark.slow


def test_the_parts_of_a_resumed_run_are_uploaded_one_behind_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for steps in (range(1, 6), range(4, 9)):  # resumed from a checkpoint of step 3
        logger = WandbLogger(
            mode=WandbMode.offline,
            group="sweep",
            notes="typed",
            name="lr=1e-3",
            tags=["debug"],
            job_type="sweep",
        )
        logger.open(tmp_path, {"git_commit": "f00d"})
        for step in steps:
            logger.log(MetricsRow(step=step, tokens=step, loss=float(step)))
        logger.finish()
        wandb.teardown()
    server = WandbServer()
    (tmp_path / "elsewhere").mkdir()  # it writes a log of its own where it runs
    try:
        synced = subprocess.run(
            [sys.executable, "-m", "wandb", "sync", str(tmp_path / "wandb")],
            env={**os.environ, "WANDB_BASE_URL": server.address, "WANDB_API_KEY": "0" * 40},
            cwd=tmp_path / "elsewhere",
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        server.close()
    assert synced.returncode == 0, synced.stdout + synced.stderr
    assert set(server.history) == {run_id(tmp_path)}
    lines = server.history[run_id(tmp_path)]
    assert sorted(lines) == list(range(10))  # none overwrites another
    assert [lines[n]["_step"] for n in range(10)] == list(range(10))
    assert [lines[n]["step"] for n in range(10)] == [*range(1, 6), *range(4, 9)]
    first = server.upserts[0]
    assert (first["groupName"], first["notes"], first["displayName"]) == ("sweep", "typed", "lr=1e-3")
    assert (first["jobType"], first["tags"]) == ("sweep", ["debug"])
    assert '"git_commit"' in first["config"]
