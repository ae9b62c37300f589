"""task=plan: print what a layout needs before anything is started, by arithmetic alone; imports no torch.

The plan has the memory of the fullest rank (weights, gradients, optimizer state, activations), the bytes
sent per step on each axis of the layout, the pipeline bubble, FLOPs per token, and a verdict: whether the
layout fits the device, and if not, the nearest change that fits. The numbers come from the `planning` room:

- planning/plan.py puts a plan together,
- planning/memory.py, activations.py and traffic.py count bytes,
- planning/report.py formats the text, which a run also stores as plan.txt,
- metrics/plan_pictures.py and timeline_page.py draw it where `task.pictures` names a directory.

launch/job.py makes the plan for every task that uses a model. launch/nearest_fix.py finds the change that
fits, which dsv3/programs.py names as well where it refuses a run.
"""

import json
import os
import sys
from pathlib import Path

from dsv3.config.task import OutputFormat
from dsv3.errors import UserError
from dsv3.launch.job import Job
from dsv3.launch.nearest_fix import nearest_fix
from dsv3.launch.sweep_report import record_plan
from dsv3.metrics.plan_pictures import draw_plan, write_pictures
from dsv3.metrics.progress import phase
from dsv3.planning.report import format_plan


class PlanTask:
    """Prints the plan; a layout that does not fit is a result here, not an error."""

    def __init__(self, format: OutputFormat, pictures: str | None = None) -> None:
        self.format = format
        self.pictures = Path(pictures) if pictures is not None else None

    def run(self, job: Job) -> None:
        """Print the job's plan to stdout, as text or as one JSON object, on rank 0 only.

        The plans of a sweep are printed together at its end, see launch/sweep_report.py. Pictures come
        first, those of a sweep's job in a folder of its number.

        Raises:
            UserError: the pictures cannot be written.
        """
        if os.environ.get("RANK", "0") != "0":
            return
        if self.pictures is not None:
            self._draw(job, self.pictures / job.sweep.number if job.sweep else self.pictures)
        if job.sweep is not None:
            record_plan(job, self.format.value)
            return
        if self.format is OutputFormat.json:
            print(json.dumps(job.plan.to_json(), indent=1))
        else:
            with phase("looking for a better layout"):
                text = format_plan(job.plan, nearest_fix(job) if job.plan.fits is False else "")
            print(text)

    def _draw(self, job: Job, directory: Path) -> None:
        """Write the plan's pictures, and tell on stderr where they are and why any is missing."""
        try:
            directory.mkdir(parents=True, exist_ok=True)  # or it is refused before anything is drawn
            with phase("drawing the plan"):
                files, missing = draw_plan(job.plan)
                written = write_pictures(directory, files)
        except OSError as error:
            raise UserError(
                f"task.pictures={self.pictures} cannot be written: {error.strerror or error}; "
                "name another directory, task.pictures=DIR"
            ) from None
        print(f"pictures: {', '.join(map(str, written))}", file=sys.stderr)
        if missing:
            print(missing, file=sys.stderr)
