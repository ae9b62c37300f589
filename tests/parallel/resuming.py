"""One step of a run on whatever layout, from its last checkpoint to the next; runs in the workers."""

from pathlib import Path

from torch import Tensor

from dsv3.checkpoint.directory import Progress
from dsv3.checkpoint.manager import CheckpointManager
from dsv3.config.checkpoint import CheckpointConfig
from dsv3.config.root import Config
from dsv3.planning.layout import ParallelDims
from dsv3.training.step import TrainStep
from tests.parallel.training import full, prepared, take_step

State = dict[str, Tensor]


def go_on(
    config: Config,
    degrees: ParallelDims | None,
    microbatch: int,
    run_dir: Path,
    optimizer_name: str = "adamw",
) -> tuple[int, State, State]:
    """Restore, take a step, save: the step restored from, and the whole tensors here before and after."""
    setup = prepared(config, degrees, optimizer_name)
    assert setup is not None
    model, optimizer, ranks = setup
    manager = CheckpointManager(run_dir, CheckpointConfig(keep_last=1, async_save=False), ranks)
    progress = manager.restore(model.parts, optimizer) or Progress()

    def state() -> State:
        tensors = {f"model.{name}": full(value).clone() for name, value in model.named_tensors().items()}
        for name, parameter in model.named_parameters().items():
            for key, value in optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = full(value).clone()
        return tensors

    before = state()
    step = TrainStep(model.forward_backward, optimizer, ranks, clip_norm=1e9)
    take_step(step, progress.step, microbatch, optimizer_name)
    manager.save(model.parts, optimizer, Progress(progress.step + 1))
    return progress.step, before, state()
