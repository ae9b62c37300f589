"""A model with the weights of `checkpoint.load`."""

from dsv3.checkpoint.directory import find_checkpoint
from dsv3.checkpoint.integrity import verify_together
from dsv3.checkpoint.matching import require_weights
from dsv3.checkpoint.weights import load_weights
from dsv3.parallel.distributed import Distributed, distribute
from dsv3.parallel.mesh import ParallelMesh, build_mesh, place
from dsv3.runtime.distributed import Worker
from dsv3.runtime.job import Job


def job_mesh(job: Job, me: Worker) -> ParallelMesh | None:
    """The mesh of the job's layout; None where this process is alone."""
    if me.world == 1:
        return None
    expert = job.config.parallel.expert
    node = expert.ranks_per_node if expert is not None else None
    return build_mesh(job.plan.degrees, me.device.type, node)


def load_model(job: Job, me: Worker) -> tuple[Distributed, Worker]:
    """The configured model on this rank, filled from the checkpoint, and the rank with its share of rows."""
    path = job.config.checkpoint.load
    checkpoint = None if path is None else find_checkpoint(path)
    if checkpoint is not None:
        verify_together(checkpoint, me)
        require_weights(job.config.model, checkpoint)  # before memory is taken
    mesh = job_mesh(job, me)
    model = distribute(job.config, mesh, me.device)
    if checkpoint is not None:
        load_weights(model.parts, checkpoint)
    return model, place(me, mesh)
