from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

from dsv3.metrics.loggers import TensorboardLogger
from dsv3.metrics.row import MetricsRow


def _run(run_dir: Path, steps: range, loss: float) -> None:
    logger = TensorboardLogger()
    logger.open(run_dir, {})
    for step in steps:
        logger.log(MetricsRow(step=step, tokens=step, loss=loss))
    logger.text("sample", "# no heading\nsecond", steps[-1])
    logger.finish()
    logger.finish()


def _events(run_dir: Path) -> EventAccumulator:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return events


def test_known_values_are_written_and_unknown_ones_left_out(tmp_path: Path) -> None:
    _run(tmp_path, range(1, 4), loss=2.5)
    events = _events(tmp_path)
    assert set(events.Tags()["scalars"]) == {"loss", "tokens"}
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.5), (2, 2.5), (3, 2.5)]
    text = events.Tensors("sample/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == "    # no heading\n    second"


def test_a_resume_replaces_the_steps_it_repeats(tmp_path: Path) -> None:
    _run(tmp_path, range(1, 6), loss=1.0)
    _run(tmp_path, range(4, 7), loss=2.0)
    values = [(event.step, event.value) for event in _events(tmp_path).Scalars("loss")]
    assert values == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]


def test_a_folder_that_cannot_be_made_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    told: list[str] = []
    logger = TensorboardLogger()
    logger.open(tmp_path, {}, notify=told.append)
    logger.log(MetricsRow(step=1, tokens=1, loss=1.0))
    logger.log(MetricsRow(step=2, tokens=2, loss=1.0))
    logger.finish()
    assert len(told) == 1
    assert told[0].startswith("warning: tensorboard is off")
