"""Set up what several tasks need: the data, the tokenizer, the mesh, and a model with its weights."""

import os
import platform
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from dsv3.checkpoint.agreement import on_main, together
from dsv3.checkpoint.directory import HF_DIR, find_checkpoint
from dsv3.checkpoint.load import load_weights, require_weights
from dsv3.checkpoint.manifest import verify_together
from dsv3.config.hardware import CPU
from dsv3.config.root import Config
from dsv3.config.strict import build
from dsv3.data.sources import PreparedData
from dsv3.distributed.process_group import RankContext, join_process_group
from dsv3.errors import UserError
from dsv3.launch.job import Job
from dsv3.launch.trained_on import checkpoint_tokenizer, tokenizer_folder, training_record
from dsv3.metrics.progress import entering, phase
from dsv3.parallel.mesh import ParallelMesh, assign_data_shard
from dsv3.parallel.parallel_model import ParallelModel, build_parallel_model
from dsv3.tokens.background_check import BACKGROUND
from dsv3.tokens.cache import CacheEntryError, is_verified
from dsv3.tokens.tokenizer import Tokenizer
from dsv3.tokens.tokenizer_files import has_tokenizer, read_stop_ids


def join_ranks(job: Job) -> AbstractContextManager[RankContext]:
    """Become one of the job's ranks, and leave them at the end; UserError for a GPU that the plan lacks."""
    planned_for_cpu = job.hardware.name == CPU
    joined = join_process_group(job.config.launch.timeout, job.on_cpu, planned_for_cpu)
    return entering("setting up device and process group", joined)


def prepare_data(
    config: Config, ranks: RankContext, tokenizer: Tokenizer | None = None, evaluate: bool = False
) -> PreparedData:
    """Return the configured data, tokenized by `tokenizer` or else by the configured one.

    Rank 0 reads the corpus and fills the data cache, where the others find the result: they wait as long as
    that moves. On a node whose cache does not have it, or a damaged one, the first rank does the same; the
    other ranks of the node read what it has verified. Token ids that are given
    are read once, a share by each rank. With `evaluate` only the held-out rows are needed. UserError, on all
    ranks alike, for token ids that the model's vocabulary lacks, and where nodes have different data.
    """
    source = build(config.data)
    tokenizer = tokenizer or build(config.tokenizer)
    how = (tokenizer, config.train.length, config.train.seed, evaluate)
    done: list[PreparedData] = []
    BACKGROUND.reset()

    def prepare() -> str:
        done.append(source.prepare(*how))
        return done[0].fingerprint

    def find() -> bool:
        if not done and recipe is not None:
            with suppress(CacheEntryError):
                done.append(source.reopen(recipe, *how))
        if not done:
            prepare()
        if done[0].fingerprint != fingerprint:
            raise UserError(
                f"the data of node {platform.node()} has the fingerprint {done[0].fingerprint}, rank 0's has "
                f"{fingerprint}: give all nodes the same files"
            )
        return done[0].is_shared

    with phase("preparing the data"):
        fingerprint = on_main(ranks, prepare)
        # A recipe may name thousands of files: it goes to every rank once, not from every rank to all.
        recipe = ranks.broadcast_object(done[0].recipe if done else None)
        together(ranks, lambda: find() if ranks.local_rank == 0 else None)
        with is_verified():
            is_shared = all(together(ranks, find))
    share = (ranks.rank, ranks.world)
    # Copies are each node's own to compare, files that all nodes read are everybody's.
    of_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    on_node = (ranks.local_rank % of_node, of_node)

    def check() -> None:
        done[0].check_vocabulary(config.model.vocab_size, share)
        done[0].check_digests(share if is_shared else on_node)

    together(ranks, check)
    BACKGROUND.start()
    return done[0]


def load_own_tokenizer(config: Config, checkpoint: Path) -> Tokenizer | None:
    """Return the tokenizer that a checkpoint carries; None where it has none or another one was chosen."""
    folder, allow = tokenizer_folder(checkpoint), config.run.allow_targets
    if folder is None or config.tokenizer != checkpoint_tokenizer(
        checkpoint, training_record(checkpoint), allow
    ):
        return None
    return read_tokenizer(folder, checkpoint)


def read_tokenizer(path: str | Path, checkpoint: Path) -> Tokenizer:
    """Return the tokenizer at `path`, which also stops at the ids that a checkpoint's files name."""
    tokenizer = Tokenizer.from_file(path)
    tokenizer.stop_also_at(read_stop_ids(checkpoint))
    stop_at_assets(tokenizer, checkpoint / HF_DIR)
    return tokenizer


def stop_at_assets(tokenizer: Tokenizer, assets: Path) -> None:
    """Let a tokenizer also stop at the ids that the assets of its weights name.

    Assets of weights that were given ids of their own since have no tokenizer, and name ids of the other one.
    """
    if has_tokenizer(assets):
        tokenizer.stop_also_at(read_stop_ids(assets))


def require_checkpoint(job: Job) -> Path:
    """Return the checkpoint that checkpoint.load names; UserError where it is not given or not found."""
    if job.config.checkpoint.load is None:
        raise UserError(
            "checkpoint.load is missing: give a run or checkpoint directory, checkpoint.load=PATH"
        )
    return find_checkpoint(job.config.checkpoint.load)


def build_mesh(job: Job, ranks: RankContext) -> ParallelMesh | None:
    """Return the device mesh of the job's layout, None where this process is alone."""
    if ranks.world == 1:
        return None
    expert = job.config.parallel.expert
    ranks_per_node = expert.ranks_per_node if expert is not None else None
    with phase("setting up the device mesh"):
        mesh = ParallelMesh(job.plan.degrees, ranks.device.type, ranks_per_node)
        ranks.limit_collectives(first_calls=True)
        return mesh


def load_model(job: Job, ranks: RankContext) -> tuple[ParallelModel, RankContext]:
    """Return the configured model as `load_parts` does, and `ranks` with its data shard."""
    mesh = build_mesh(job, ranks)
    return load_parts(job.config, mesh, ranks), assign_data_shard(ranks, mesh)


def load_parts(config: Config, mesh: ParallelMesh | None, ranks: RankContext) -> ParallelModel:
    """Return this rank's parts of the configured model, with the weights of checkpoint.load.

    Without checkpoint.load the model has its initial weights. UserError for a checkpoint that is damaged or
    of another model.
    """
    path = config.checkpoint.load
    checkpoint = None if path is None else find_checkpoint(path)
    if checkpoint is not None:
        verify_together(checkpoint, ranks)
        with phase("comparing the checkpoint with the model"):
            require_weights(config.model, checkpoint)  # before memory is taken
    model = build_parallel_model(config, mesh, ranks.device, initial=checkpoint is None)
    if checkpoint is not None:
        load_weights(model.model_parts, checkpoint, ranks)
    return model
