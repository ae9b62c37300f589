"""task=compare: sort the runs of a directory, such as a sweep's, by held-out loss; a table and a picture.

Reads only the files that the runs left, and imports no torch.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv3.config.convergence import Kind
from dsv3.config.task import OutputFormat
from dsv3.errors import UserError
from dsv3.launch.job import Job
from dsv3.launch.run_results import (
    RunSummary,
    config_differences,
    differing_overrides,
    find_runs,
    format_differences,
    format_runs,
    held_out_differences,
)
from dsv3.launch.trained_on import changed_data_notes
from dsv3.metrics.console import replace_control_characters
from dsv3.metrics.plots import plot_comparison
from dsv3.metrics.progress import phase

NAMED = 5
"""Damaged runs that are named."""


class CompareTask:
    """Prints the runs below a directory, the best first, and draws their loss curves.

    With a `reference`, the table also has the largest relative difference of any step's training loss from
    that job's.
    """

    def __init__(
        self,
        runs: str,
        output: str | None,
        format: OutputFormat,
        reference: str | None = None,
        mixed_data: bool = False,
    ) -> None:
        self.directory = Path(runs)
        self.output = Path(output) if output is not None else self.directory / "compare.png"
        self.format = format
        self.reference = reference
        self.mixed_data = mixed_data

    def run(self, job: Job) -> None:
        """Print to stdout, as a table or as one JSON object; nothing is written into a run's directory.

        A run with a file that cannot be read is compared by what its other files tell.

        Raises:
            UserError: such a run is there, once all is printed; held-out data differ; the picture cannot be
                written.
        """
        runs = find_runs(self.directory)
        mixed = held_out_differences(runs)
        if mixed and not self.mixed_data:
            raise UserError(
                f"the runs of {self.directory} cannot be ranked, their held-out data differ: "
                f"{format_differences(mixed)}\n"
                "task.mixed_data=true ranks them all the same, with a column of these differences"
            )
        keys = differing_overrides(runs)
        reference = None
        if self.reference is not None:
            reference = next((run for run in runs if run.name == self.reference), None)
            if reference is None:
                names = ", ".join(run.name for run in runs)
                raise UserError(
                    f"task.reference={self.reference} is none of the jobs of {self.directory}: {names}"
                )
        apart = [loss_differences(run, reference) if reference else [] for run in runs]
        farthest = [max((difference for _, difference in pairs), default=None) for pairs in apart]
        plot = self._draw(runs, keys, apart)
        if self.format is OutputFormat.json:
            entries = [_to_json(run, keys, value) for run, value in zip(runs, farthest, strict=True)]
            told = [
                {"key": key, "kind": kind.name, "values": values}
                for key, kind, values in config_differences(runs)
            ]
            found = {"runs": entries, "differences": told, "held_out_data": mixed, "plot": plot and str(plot)}
            print(json.dumps(found, indent=1))
            _require_sound(runs)
            return
        print(format_runs(runs, keys, farthest if reference else None, mixed))
        differing = config_differences(runs)
        for kind, what in ((Kind.learnt, "what is learnt"), (Kind.computed, "how it is computed alone")):
            if found_keys := [key for key, found_kind, _ in differing if found_kind is kind]:
                print(f"differences in {what}: {', '.join(found_keys)}")
        for run in runs:
            for note in changed_data_notes(run.data_changes):
                print(f"{run.name}: {note}")
        for run in runs:
            if run.failure:
                print(f"{run.name} failed: {replace_control_characters(run.failure)}")
        print(f"curves: {plot}" if plot else "no curves: no run has made a step")
        _require_sound(runs)

    def _draw(
        self, runs: Sequence[RunSummary], keys: Sequence[str], apart: Sequence[list[tuple[int, float]]]
    ) -> Path | None:
        """Draw the runs that made a step, with their differences from the reference; return the file."""
        drawn = [(run, pairs) for run, pairs in zip(runs, apart, strict=True) if run.rows]
        if not drawn:
            return None
        curves = [(run.format_overrides(keys) or run.name, run.rows) for run, _ in drawn]
        title = f"Runs of {self.directory.absolute().name}"
        try:
            with phase("drawing the curves"):
                plot_comparison(curves, self.output, title, [pairs for _, pairs in drawn])
        except OSError as error:
            raise UserError(
                f"task.output={self.output} cannot be written: {error.strerror}; "
                "name another file, task.output=FILE.png"
            ) from None
        return self.output


def _require_sound(runs: Sequence[RunSummary]) -> None:
    """Raise UserError that names the runs with files that cannot be read, and says what is wrong."""
    damaged = [run for run in runs if run.damage]
    if damaged:
        names = ", ".join(run.name for run in damaged[:NAMED])
        more = f" and {len(damaged) - NAMED} more" if len(damaged) > NAMED else ""
        raise UserError(
            f"{len(damaged)} of {len(runs)} runs ({names}{more}) lack what cannot be read, all others are "
            f"compared: {damaged[0].damage[0]}"
        )


def loss_differences(run: RunSummary, reference: RunSummary) -> list[tuple[int, float]]:
    """Return (step, |loss - reference's| / |reference's|) of the steps that have a training loss in both."""
    losses = {row.step: row.loss for row in reference.rows}
    pairs = [(row.step, row.loss, losses.get(row.step)) for row in run.rows]
    return [(step, abs(loss - other) / abs(other)) for step, loss, other in pairs if loss and other]


def _to_json(run: RunSummary, keys: Sequence[str], farthest: float | None) -> dict[str, Any]:
    """Return the run's entry of the JSON object."""
    return {
        "job": run.name,
        "directory": str(run.directory),
        "overrides": {key: run.overrides[key] for key in keys if key in run.overrides},
        "evaluation_loss": run.held_out,
        "loss": run.loss,
        "step": run.step,
        "steps": run.steps,
        "tokens_per_second": run.tokens_per_second,
        "planned_tokens_per_second": run.planned_tokens_per_second,
        "memory_gib": run.memory_gib,
        "planned_memory_gib": run.planned_memory_gib,
        "state": run.state.value,
        "reason": run.failure or None,
        "damage": run.damage,
        "largest_difference": farthest,
        "convergence": run.convergence,
        "data_changes": run.data_changes,
    }
