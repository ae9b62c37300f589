"""Worker side: count the bytes that a rank sends in a training step, by mesh axis (benchmarks/traffic.py).

Collectives count as the rings of planning/traffic.py. All-to-alls and the sends between pipeline stages count
as the bytes that leave the rank. The functions run in the workers of the pool.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3.data.batch import Batch
from dsv3.launch.job import Job, plan_job
from dsv3.model.kv_cache import LatentCache
from dsv3.model.router import Routing
from dsv3.parallel.mesh import ParallelMesh
from dsv3.parallel.parallel_model import ParallelModel, build_parallel_model
from dsv3.planning.layout import ParallelDims
from dsv3.planning.sharding import FP32
from dsv3.planning.step_shape import StepShape
from dsv3.planning.traffic import forward_traffic, once_gathered_traffic, pipeline_traffic
from dsv3.training.loss import LossDenominators
from dsv3.training.schedule import StepHyperparameters
from dsv3.training.step import routers_by_place
from tests.harness.composing import strict_config
from tests.parallel.tiny_training import TINY, VOCAB, mesh_of

OTHER = "other"
"""Traffic that the plan leaves out: row counts, and the sums of the balance loss."""
FSDP_AXES = {"_allgather_base_": "dp", "_reduce_scatter_base_": "dp", "allreduce_": "dp_replicate"}
UNCOUNTED = ("recv_", "wait_tensor", "monitored_barrier_", "barrier")


@dataclass
class StepTraffic:
    """A step of one rank: bytes sent and bytes planned by axis, and its rows per destination ep rank."""

    degrees: ParallelDims
    sent: dict[str, int]
    planned: dict[str, int]
    rows: list[int]
    row_bytes: int
    """Bytes of a row on its way to its experts, with the weights of those behind the rank, and back."""


class SentBytes(TorchDispatchMode):
    """Dispatch mode that sums the bytes that this rank sends, by axis."""

    def __init__(self, mesh: ParallelMesh) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_axis: Counter[str] = Counter()
        axes = {"tp": (mesh.dense, mesh.degrees.tp), "cp": (mesh.cp, mesh.degrees.cp)}
        self.ranks = {a: _ranks(cut.get_group(a)) for a, (cut, size) in axes.items() if cut and size > 1}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.split("::")[1]
        if function.namespace in ("c10d", "_c10d_functional") and name not in UNCOUNTED:
            names = [argument.name for argument in function._schema.arguments]
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            axis, count = (
                self._count_torch(name, given)
                if function.namespace == "c10d"
                else self._count_functional(name, given)
            )
            self.by_axis[axis] += count
        return function(*args, **(kwargs or {}))

    def _count_torch(self, name: str, given: dict[str, Any]) -> tuple[str, int]:
        """Return axis and bytes of FSDP's collectives and of the sends of a pipeline."""
        if name == "send":
            return "pp", sum(x.nbytes for x in given["tensors"])
        ranks = dist.ProcessGroup.unbox(given["process_group"]).size()
        whole = {
            "_allgather_base_": lambda: given["output_tensor"].nbytes,
            "_reduce_scatter_base_": lambda: given["input_tensor"].nbytes,
            "allreduce_": lambda: 2 * sum(x.nbytes for x in given["tensors"]),
        }[name]()
        return FSDP_AXES[name], whole * (ranks - 1) // ranks

    def _count_functional(self, name: str, given: dict[str, Any]) -> tuple[str, int]:
        """Return axis and bytes of the collectives of parallel/collectives.py."""
        x, group = given["input"], _resolve_process_group(given["group_name"])
        if name == "all_to_all_single":
            splits = given["input_split_sizes"]
            leaving = sum(splits) - splits[group.rank()]
            # Row counts are integers; the rows are not.
            return "ep" if x.is_floating_point() else OTHER, leaving * x[:1].nbytes
        times = {"all_gather_into_tensor": group.size(), "reduce_scatter_tensor": 1, "all_reduce": 2}[name]
        axis = next((axis for axis, ranks in self.ranks.items() if ranks == _ranks(group)), OTHER)
        # The loss over a sharded vocabulary sums one value per token, the balance loss one per expert.
        axis = OTHER if name == "all_reduce" and x.shape[-1] > 1 else axis
        return axis, times * x.nbytes * (group.size() - 1) // group.size()


def _ranks(group: dist.ProcessGroup) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))


def planned_job(overrides: list[str], world: int) -> Job:
    """Plan the job of the tiny model; composing takes half a second, so do it once for all ranks."""
    chosen = ["task=plan", f"launch.world_size={world}", *TINY, *overrides]
    return plan_job(strict_config(chosen), [])


def count_step(job: Job) -> StepTraffic | None:
    """Train a step of `job` and return this rank's traffic; None on ranks that the job leaves out."""
    degrees, shape = job.plan.degrees, job.plan.shape
    world, mesh = degrees.world_size, mesh_of(degrees)
    if dist.get_rank() >= world:
        return None
    model = build_parallel_model(job.config, mesh, torch.device("cpu"))
    if degrees.pp > 1:
        # PyTorch's stages send their neighbours a first message in the first step.
        _train(model, shape, mesh.data_rank, degrees)
    rows = RowsPerRank(degrees.ep, model)
    with SentBytes(mesh) as sent:
        _train(model, shape, mesh.data_rank, degrees)
    stage = dist.get_rank() // (world // degrees.pp)
    c = job.config.model
    expected = pipeline_traffic(c, degrees, shape)[stage].to_json()
    row_bytes = 2 * c.dim * shape.state.compute + 2 * FP32 * c.moe.num_experts // degrees.ep
    return StepTraffic(degrees, dict(sent.by_axis), expected, rows.counts.tolist(), row_bytes)


def count_forward(job: Job) -> list[dict[str, tuple[int, int]]] | None:
    """Evaluate a microbatch, then decode a token; return bytes sent and planned by axis of the two passes."""
    degrees, shape, c = job.plan.degrees, job.plan.shape, job.config.model
    mesh = mesh_of(degrees)
    if dist.get_rank() >= degrees.world_size:
        return None
    model = build_parallel_model(job.config, mesh, torch.device("cpu"))
    tokens = (
        torch.arange(shape.microbatch_size * shape.sequence_length).view(shape.microbatch_size, -1) % VOCAB
    )
    batch = Batch(tokens, tokens.roll(-1, 1), torch.zeros_like(tokens))
    parts = [str(name) for part in model.model_parts for name in part.layers]
    cache = LatentCache(c, 1, 64, torch.float32, torch.device("cpu"), parts)
    forward = model.forward_backward
    for part in model.model_parts:
        part.eval()
    with torch.no_grad():
        with SentBytes(mesh) as first:
            forward.evaluate(batch)
        with SentBytes(mesh) as scored:
            forward.evaluate(batch)
        prompt = 2 * degrees.cp * degrees.tp
        forward.next_logits(tokens[:1, :prompt], cache.extend([prompt]))
        with SentBytes(mesh) as decoded:
            forward.next_logits(tokens[:1, : degrees.tp], cache.extend([1], degrees.tp))
    (stage,) = shape.stages_of_ranks(c, degrees)[dist.get_rank() // (degrees.world_size // degrees.pp)]
    one = replace(shape, microbatch_size=1, sequence_length=degrees.cp * degrees.tp)
    once = once_gathered_traffic(c, degrees, shape, stage)
    found = [{"once": (first.by_axis["dp"] - scored.by_axis["dp"], once)}]
    for sent, planned in (
        (scored, forward_traffic(c, degrees, shape, stage)),
        (decoded, forward_traffic(c, degrees, one, stage, decodes=True)),
    ):
        found.append({axis: (sent.by_axis[axis], bytes_) for axis, bytes_ in vars(planned).items()})
    return found


def _train(model: ParallelModel, shape: StepShape, seed: int, degrees: ParallelDims) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(shape.microbatches):
        size = (shape.microbatch_size, shape.sequence_length)
        tokens = torch.randint(0, VOCAB, size, generator=generator)
        batches.append(Batch(tokens, tokens.roll(-1, 1), torch.zeros_like(tokens)))
    for part in model.model_parts:
        part.train()
    sequences = shape.microbatches * shape.microbatch_size * degrees.data_parallel
    denominators = LossDenominators(torch.tensor(sequences * shape.sequence_length), sequences)
    step = StepHyperparameters(lr=0.0, mtp_weight=0.3, balance_weight=1e-4, bias_speed=0.0, z_loss_weight=0.0)
    model.forward_backward.train(batches, denominators, step)


class RowsPerRank:
    """Counts, at the routers, the rows for each ep rank: one per token and rank with any of its experts."""

    def __init__(self, ranks: int, model: ParallelModel) -> None:
        self.counts = torch.zeros(ranks, dtype=torch.int64)
        for router in routers_by_place(model.model_parts).values():
            router.register_forward_hook(self._add)

    def _add(self, router: nn.Module, _: Any, routing: Routing) -> None:
        ranks = len(self.counts)
        experts_per_rank = routing.stats.load.shape[0] // ranks
        to_rank = torch.zeros(len(routing.experts), ranks, dtype=torch.bool)
        self.counts += to_rank.scatter(1, routing.experts // experts_per_rank, True).sum(0)
