"""Data for a task: prepared once by rank 0, then found in the cache by the others.

A model with the weights of `checkpoint.load`.
"""

from pathlib import Path

from dsv3.checkpoint.directory import TOKENIZER_DIR, find_checkpoint
from dsv3.checkpoint.load import load_weights, require_weights
from dsv3.checkpoint.manifest import verify_together
from dsv3.config.root import Config
from dsv3.config.strict import build
from dsv3.data.sources import PreparedData
from dsv3.data.tokenizer import Tokenizer
from dsv3.distributed.process_group import RankContext
from dsv3.launch.job import Job
from dsv3.parallel.mesh import ParallelMesh, build_mesh, place
from dsv3.parallel.parallel_model import ParallelModel, build_parallel_model


def prepare_data(
    config: Config, ranks: RankContext, tokenizer: Tokenizer | None = None, evaluate: bool = False
) -> PreparedData:
    """The configured data and tokenizer (or the one given), checked against the model's vocabulary."""
    source = build(config.data)
    chosen = tokenizer or build(config.tokenizer)

    def prepare() -> PreparedData:
        data: PreparedData = source.prepare(chosen, config.train.length, config.train.seed, evaluate)
        return data

    # One process does the work and the rest find it done. A failure of rank 0 ends the others too.
    data = prepare() if ranks.local_rank == 0 else None
    ranks.barrier()
    data = data or prepare()
    data.check_vocabulary(config.model.vocab_size)
    return data


def stored_tokenizer(config: Config, checkpoint: Path, overrides: list[str]) -> Tokenizer | None:
    """The tokenizer that lies with a checkpoint, unless the user chose another."""
    chosen = any(o.lstrip("+").startswith("tokenizer") for o in overrides)
    folder = checkpoint / TOKENIZER_DIR
    if (checkpoint / "tokenizer.json").is_file():
        folder = checkpoint  # a HuggingFace checkpoint
    return Tokenizer.from_file(folder) if folder.is_dir() and not chosen else None


def job_mesh(job: Job, ranks: RankContext) -> ParallelMesh | None:
    """The mesh of the job's layout; None where this process is alone."""
    if ranks.world == 1:
        return None
    expert = job.config.parallel.expert
    node = expert.ranks_per_node if expert is not None else None
    return build_mesh(job.plan.degrees, ranks.device.type, node)


def load_model(job: Job, ranks: RankContext) -> tuple[ParallelModel, RankContext]:
    """The configured model on this rank, filled from the checkpoint, and the rank with its share of rows."""
    path = job.config.checkpoint.load
    checkpoint = None if path is None else find_checkpoint(path)
    if checkpoint is not None:
        verify_together(checkpoint, ranks)
        require_weights(job.config.model, checkpoint)  # before memory is taken
    mesh = job_mesh(job, ranks)
    model = build_parallel_model(job.config, mesh, ranks.device)
    if checkpoint is not None:
        load_weights(model.parts, checkpoint)
    return model, place(ranks, mesh)
