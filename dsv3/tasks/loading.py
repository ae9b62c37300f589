"""A model with the weights of `checkpoint.load`."""

from dsv3.checkpoint.directory import find_checkpoint
from dsv3.checkpoint.manager import load_weights
from dsv3.model.transformer import Transformer
from dsv3.parallel.mesh import build_mesh
from dsv3.parallel.parallelizer import build_model
from dsv3.runtime.distributed import Worker
from dsv3.runtime.job import Job


def load_model(job: Job, me: Worker) -> Transformer:
    """Build the configured model on this rank and fill it from the checkpoint."""
    mesh = build_mesh(job.plan.degrees, me.device.type) if me.world > 1 else None
    model = build_model(job.config, mesh, me.device)
    if job.config.checkpoint.load is not None:
        load_weights(model, find_checkpoint(job.config.checkpoint.load))
    return model
