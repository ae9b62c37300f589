"""The reader of run directories for corruptions.py: task=compare over two runs, of which one is damaged."""

import contextlib
import io
import json
from pathlib import Path

import yaml

from dsv3.config.task import OutputFormat
from dsv3.metrics.row import MetricsRow
from dsv3.tasks.compare import CompareTask
from tests.faults.corruptions import Reader


def write_runs(folder: Path) -> Path:
    """Write a sweep of a finished and of a failed run, as far as task=compare reads them."""
    for number in range(2):
        run = folder / "sweep" / str(number)
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(yaml.safe_dump({"train": {"steps": 3}, "data": {"path": "x"}}))
        (run / "overrides.yaml").write_text(yaml.safe_dump([f"train.steps={number + 3}", "data=text"]))
        rows = [MetricsRow(step=step, tokens=step * 10, loss=5.0 - step, lr=0.1) for step in (1, 2, 3)]
        rows[-1].evaluation_loss = 4.0 + number
        (run / "metrics.jsonl").write_text("".join(row.to_json() + "\n" for row in rows))
        data = {"fingerprint": "ab", "tokenizer_fingerprint": "cd", "rows_held_out": 3, "rows_evaluated": 3}
        data |= {"changes": [{"step": 1, "fingerprint": "ef", "before": "gh", "told": "1 file changed"}]}
        (run / "environment.json").write_text(json.dumps({"data": data, "convergence": "12"}))
    return folder / "sweep"


def read_runs(path: Path) -> None:
    """Compare the runs, as a table and as JSON, without a picture."""
    for form in OutputFormat:
        task = CompareTask(str(path), None, form, mixed_data=True)
        task._draw = lambda *_: None  # type: ignore[method-assign]  # a second of matplotlib
        with contextlib.redirect_stdout(io.StringIO()):
            task.run(None)  # type: ignore[arg-type]  # it is not looked at


RUNS = Reader("runs", write_runs, read_runs)
