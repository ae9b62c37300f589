"""task=plan: what a layout needs, by arithmetic alone; imports no torch."""

import json
import os

from dsv3.config.task import PlanFormat
from dsv3.launch.job import Job
from dsv3.planning.report import to_text


class Plan:
    """Prints the plan; a layout that does not fit is a result here, not an error."""

    def __init__(self, format: PlanFormat) -> None:
        self.format = format

    def run(self, job: Job) -> None:
        """Print the job's plan to stdout, as text or as one JSON object; once, also under torchrun."""
        if os.environ.get("RANK", "0") != "0":
            return
        if self.format is PlanFormat.json:
            print(json.dumps(job.plan.to_json(), indent=1))
        else:
            print(to_text(job.plan))
