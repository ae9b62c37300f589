"""task=plan: print what a layout needs before anything is started, by arithmetic alone; imports no torch.

The plan has the memory of the fullest rank (weights, gradients, optimizer state, activations), the bytes
sent per step on each axis of the layout, the pipeline bubble, FLOPs per token, and a verdict: whether the
layout fits the device, and if not, the nearest change that fits. The numbers come from the `planning` room:

- planning/plan.py puts a plan together,
- planning/memory.py, activations.py and traffic.py count bytes,
- planning/report.py formats the text, which a run also stores as plan.txt.

launch/job.py makes the plan for every task that uses a model. launch/nearest_fix.py finds the change that
fits, which dsv3/programs.py names as well where it refuses a run.
"""

import json
import os

from dsv3.config.task import OutputFormat
from dsv3.launch.job import Job
from dsv3.launch.nearest_fix import nearest_fix
from dsv3.launch.sweep_report import record_plan
from dsv3.metrics.progress import phase
from dsv3.planning.report import format_plan


class PlanTask:
    """Prints the plan; a layout that does not fit is a result here, not an error."""

    def __init__(self, format: OutputFormat) -> None:
        self.format = format

    def run(self, job: Job) -> None:
        """Print the job's plan to stdout, as text or as one JSON object, on rank 0 only.

        The plans of a sweep are printed together at its end, see launch/sweep_report.py.
        """
        if os.environ.get("RANK", "0") != "0":
            return
        if job.sweep is not None:
            record_plan(job, self.format.value)
            return
        if self.format is OutputFormat.json:
            print(json.dumps(job.plan.to_json(), indent=1))
        else:
            with phase("looking for a better layout"):
                text = format_plan(job.plan, nearest_fix(job) if job.plan.fits is False else "")
            print(text)
