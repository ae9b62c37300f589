"""A model with the weights of `checkpoint.load`."""

from dsv3.checkpoint.directory import find_checkpoint
from dsv3.checkpoint.manager import load_weights
from dsv3.checkpoint.matching import require_weights
from dsv3.parallel.distributed import Distributed, distribute
from dsv3.parallel.mesh import build_mesh, place
from dsv3.runtime.distributed import Worker
from dsv3.runtime.job import Job


def load_model(job: Job, me: Worker) -> tuple[Distributed, Worker]:
    """Build the configured model on this rank and fill it from the checkpoint; also the rank's share of rows."""
    path = job.config.checkpoint.load
    checkpoint = None if path is None else find_checkpoint(path)
    if checkpoint is not None:
        require_weights(job.config.model, checkpoint)  # before memory is taken
    mesh = build_mesh(job.plan.degrees, me.device.type) if me.world > 1 else None
    model = distribute(job.config, mesh, me.device)
    if checkpoint is not None:
        load_weights(model.parts, checkpoint)
    return model, place(me, mesh)
