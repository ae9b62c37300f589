"""Worker side: one step of a run on any layout, from its last checkpoint to the next."""

from pathlib import Path

from torch import Tensor

from dsv3.checkpoint.directory import Progress
from dsv3.checkpoint.manager import CheckpointManager
from dsv3.config.checkpoint import CheckpointConfig
from dsv3.config.root import Config
from dsv3.planning.layout import ParallelDims
from dsv3.training.step import TrainStep
from tests.parallel.tiny_training import full, prepared, take_step

State = dict[str, Tensor]


def resume_one_step(
    config: Config,
    degrees: ParallelDims | None,
    microbatch: int,
    run_dir: Path,
    optimizer_name: str = "adamw",
) -> tuple[int, State, State]:
    """Restore, take a step and save; return the restored step and the whole tensors before and after."""
    setup = prepared(config, degrees, optimizer_name)
    assert setup is not None
    model, optimizer, ranks = setup
    manager = CheckpointManager(run_dir, CheckpointConfig(keep_last=1, async_save=False), ranks)
    progress = manager.restore(model.model_parts, optimizer) or Progress()

    def state() -> State:
        tensors = {f"model.{name}": full(value).clone() for name, value in model.state_dict().items()}
        for name, parameter in (item for part in model.model_parts for item in part.named_parameters()):
            for key, value in optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = full(value).clone()
        return tensors

    before = state()
    step = TrainStep(model.forward_backward, optimizer, ranks, clip_norm=1e9)
    take_step(step, progress.step, microbatch, optimizer_name)
    manager.save(model.model_parts, optimizer, Progress(progress.step + 1))
    return progress.step, before, state()
