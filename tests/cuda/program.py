"""train.py as a whole on a simulated GPU, in the process of run_cases.py: two runs, the second one a
resume."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from tests.cuda.ledger import LEDGER

NEVER = (
    "training/step.py",
    "training/loop.py",
    "training/schedule.py",
    "distributed/",
    "data/",
    "parallel/",
    "model/moe",
)
"""Files in which a step of one rank never waits; metrics, evaluation, samples and checkpoints may."""


def train_py_trains_evaluates_samples_saves_and_resumes() -> None:
    """Train 3 steps in bf16 with documents, resume to 5; the steps themselves make the host wait nowhere."""
    from dsv3.checkpoint.directory import complete_steps
    from dsv3.config.task import SamplingConfig
    from dsv3.programs import TRAIN
    from tests.harness.commands import run_here
    from tests.harness.runs import rows, write_texts
    from tests.harness.tiny import MODEL, TRAINING

    folder = Path(tempfile.mkdtemp())
    (folder / "texts").mkdir()
    data = [
        "data=text",
        f"data.path={write_texts(folder / 'texts', files=40, words=30)}",
        "data.document_mask=true",
    ]
    run = folder / "run"
    steps = ["train.steps=3", "train.log_every=1", "train.evaluate_every=2", "train.checkpoint_every=2"]
    first = [*MODEL, *TRAINING, *data, *steps, "precision=bf16", "train.microbatch_size=2", f"run.dir={run}"]
    smi = folder / "nvidia-smi"  # the plan is of a GPU
    smi.write_text("#!/bin/sh\necho NVIDIA H100 80GB HBM3, 81559\n")
    smi.chmod(0o755)
    with (
        patch.dict("os.environ", PATH=f"{folder}:/usr/bin:/bin"),
        patch("dsv3.tasks.train.plot_loss_curve", lambda *_: None),
        patch("dsv3.tasks.train.SAMPLING", SamplingConfig(max_tokens=4)),
    ):
        assert run_here(TRAIN, first) == 0
        assert run_here(TRAIN, [f"resume={run}", "train.steps=5"]) == 0
    written = rows(run)
    assert [row["step"] for row in written] == [1, 2, 3, 4, 5]
    assert written[-1]["loss"] < written[0]["loss"]
    assert written[-1]["evaluation_loss"] is not None
    assert complete_steps(run)[-1].name.endswith("5")
    told = (run / "log.txt").read_text() + (run / "this_run.txt").read_text()
    assert "varlen" in told, "the kernel that a GPU has for documents"
    waited = [place for place in LEDGER.waits if place.startswith(NEVER)]
    assert not waited, waited


CHECKS: dict[str, Callable[[], None]] = {
    "train_py_trains_evaluates_samples_saves_and_resumes": train_py_trains_evaluates_samples_saves_and_resumes
}
