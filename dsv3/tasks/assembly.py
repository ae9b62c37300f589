"""Put together what takes the optimizer steps of a job; task=train and task=replay share it.

Nothing here writes a file of the run: the run directory, its checkpoints and its callbacks are those of
tasks/train.py.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

import torch

from dsv3.checkpoint.directory import (
    ASSETS_DIR,
    TOKENIZER_DIR,
    Progress,
    find_checkpoint,
    newest_checkpoint,
)
from dsv3.checkpoint.load import load_weights
from dsv3.checkpoint.manifest import verify_together
from dsv3.checkpoint.run_statistics import RunStatistics
from dsv3.config.accidents import AccidentsConfig
from dsv3.config.root import Config
from dsv3.data.lanes import LaneRows
from dsv3.data.loader import DataLoader
from dsv3.data.prefetch import Prefetcher
from dsv3.data.sources import PreparedData
from dsv3.distributed.process_group import RankContext
from dsv3.errors import UserError
from dsv3.launch.job import Job
from dsv3.parallel.mesh import assign_data_shard
from dsv3.parallel.parallel_model import ParallelModel, build_parallel_model
from dsv3.planning.batch_schedule import BatchSchedule
from dsv3.tasks.setup import build_mesh, load_own_tokenizer, stop_at_assets
from dsv3.tokens.tokenizer import Tokenizer
from dsv3.training.optimizer import build_optimizer
from dsv3.training.schedule import build_schedule
from dsv3.training.step import TrainStep
from dsv3.training.step_guard import StepGuard
from dsv3.training.step_taker import StepTaker


@dataclass
class Assembly:
    """The parts of training on this rank, built but not filled from a checkpoint."""

    config: Config
    data: PreparedData
    model: ParallelModel
    optimizer: torch.optim.Optimizer
    ranks: RankContext
    """With the share of the data that the layout gives this rank."""

    def begin_with(self, checkpoint: Path | None) -> Progress:
        """Load the weights alone, of checkpoint.load, at the start of a run; return its progress."""
        if checkpoint is not None:
            verify_together(checkpoint, self.ranks)
            load_weights(self.model.model_parts, checkpoint, self.ranks)
        return Progress()

    def go_on(self, progress: Progress) -> None:
        """Let data that streams be read on from where `progress` is."""
        if isinstance(self.data.train, LaneRows):
            self.data.train.go_on(progress.bookmarks)

    def steps(self, statistics: RunStatistics, accidents: AccidentsConfig) -> StepTaker:
        """Return what takes the optimizer steps, on this rank's share of the training rows.

        `statistics` are those of the run's progress; by them and the rule `accidents` steps with bad numbers
        are kept out.
        """
        train, ranks = self.config.train, self.ranks
        assert self.data.train is not None
        guard = StepGuard(accidents, statistics, ranks.device, self.optimizer)
        step = TrainStep(self.model.forward_backward, self.optimizer, ranks, train.clip_norm, guard)
        batch, pinned = BatchSchedule.of(train), ranks.device.type == "cuda"
        share = (ranks.data_rank, ranks.data_world)
        loader = DataLoader(self.data.train, batch, train.microbatch, *share, pinned)
        batches = Prefetcher(loader, train.prefetch, ranks.device)
        return StepTaker(step, batches, build_schedule(self.config), self.config)


def assemble(job: Job, world: RankContext, data: PreparedData, initial: bool) -> Assembly:
    """Build mesh, model and optimizer on this rank of `world`; all ranks call it together.

    Without `initial` a checkpoint must fill the model: no weight is drawn.
    """
    config, mesh = job.config, build_mesh(job, world)
    model = build_parallel_model(config, mesh, world.device, initial=initial)
    optimizer = build_optimizer(config.optimizer, model.model_parts, config.precision.moments)
    return Assembly(config, data, model, optimizer, assign_data_shard(world, mesh))


def _check_tokenizer(tokenizer: Tokenizer, run_dir: Path) -> None:
    """Raise UserError where a run's tokenizer gives other ids than the copy in its newest checkpoint.

    Both are read now: a fingerprint that was stored by another version of the library may differ by itself.
    """
    newest = newest_checkpoint(run_dir)
    copy = newest / TOKENIZER_DIR if newest else None
    if copy is None or not copy.is_dir():
        return
    if Tokenizer.from_file(copy).fingerprint() != tokenizer.fingerprint():
        folder = run_dir / TOKENIZER_DIR
        raise UserError(
            f"{folder} has changed: the weights know the ids of {copy}\n"
            f"put that back: {shlex.join(['cp', '-r', f'{copy}/.', f'{folder}/'])}"
        )


def own_tokenizer(job: Job) -> Tokenizer | None:
    """Return the tokenizer whose ids the weights know: the run's own, or that of checkpoint.load."""
    if job.config.run.resume:
        folder = job.run_dir / TOKENIZER_DIR
        if not folder.is_dir():
            return None
        tokenizer = Tokenizer.from_file(folder)
        _check_tokenizer(tokenizer, job.run_dir)
        stop_at_assets(tokenizer, job.run_dir / ASSETS_DIR)
        return tokenizer
    if job.config.checkpoint.load:
        return load_own_tokenizer(job.config, find_checkpoint(job.config.checkpoint.load))
    return None
