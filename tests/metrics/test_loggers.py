from pathlib import Path

import pytest

from dsv3.metrics.loggers import ConsoleLogger, Logger, NoLogger, TensorboardLogger
from dsv3.metrics.row import MetricsRow
from dsv3.metrics.wandb import WandbLogger


def test_every_logger_keeps_the_protocol() -> None:
    loggers: list[Logger] = [NoLogger(), ConsoleLogger(), TensorboardLogger(), WandbLogger()]
    assert len(loggers) == 4  # mypy does the checking


@pytest.mark.parametrize("logger", [NoLogger(), ConsoleLogger()])
def test_the_loggers_of_nothing_write_nothing(
    logger: Logger, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logger.open(tmp_path, {})
    logger.log(MetricsRow(step=1, tokens=1))
    logger.text("sample", "text", 1)
    logger.finish()
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
