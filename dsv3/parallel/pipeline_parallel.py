"""One stage of a pipeline: some layers, with the embedding or the head and the losses at its ends.

Pipeline parallelism through torch.distributed.pipelining: stages of layers, and the passes over them.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from dsv3.config.parallel import PipelineConfig
from dsv3.config.root import Config
from dsv3.data.batch import Batch
from dsv3.errors import RunFailed
from dsv3.model.transformer import ModelOutput, Transformer, sum_stats
from dsv3.parallel.mesh import ParallelMesh
from dsv3.parallel.parallelize import build_on_meta, materialize, parallelize
from dsv3.planning.pipeline_stages import split_layers, stages_of_rank, stages_per_rank
from dsv3.training.forward_backward import LossWeights, placed_routers
from dsv3.training.loss import LossDenominators, losses
from dsv3.training.optimizer import local


class Stage(nn.Module):
    """What one pipeline stage computes on every microbatch.

    The first takes tokens, the others hidden states [batch, sequence, dim]; the last gives the loss to be
    minimised [1] - in evaluation mode logits, this rank's part - and the others hidden states. Rows of
    tokens, targets and documents reach every stage whole: positions, masks and MTP need them.
    """

    def __init__(self, model: Transformer, first: bool, last: bool, document_mask: bool) -> None:
        super().__init__()
        self.model = model
        self.first = first
        self.last = last
        self.document_mask = document_mask
        self.places = list(placed_routers([model]))
        self.whole: LossDenominators | None = None
        self.weights: LossWeights | None = None
        self.figures = torch.zeros(0)

    def begin(self, whole: LossDenominators, weights: LossWeights) -> None:
        """What the next step's microbatches are measured with; figures start again from 0."""
        self.whole, self.weights = whole, weights
        self.figures = torch.zeros(3 + self.model.config.num_moe_layers, device=whole.tokens.device)

    def forward(
        self, x: Tensor, tokens: Tensor, targets: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """See the class; `tokens`, `targets` and `documents` are [batch, sequence]."""
        model = self.model
        layer_inputs = model.layer_inputs(tokens, documents if self.document_mask else None)
        x = model.embed(model.sequence_shard.take_local(tokens)) if self.first else x
        x, stats = model.run_layers(x, layer_inputs)
        output = ModelOutput(x, [], *sum_stats(stats, x))
        if self.last:
            logits, mtp_logits, more = model.predict(model.norm(x), tokens, layer_inputs)
            output = ModelOutput(logits, mtp_logits, *sum_stats(stats + more, x))
        if not model.training:
            return output.logits
        assert targets is not None
        assert documents is not None
        return self._weighed(output, Batch(tokens, targets, documents))

    def _weighed(self, output: ModelOutput, batch: Batch) -> Tensor:
        """The loss of the last stage, or the hidden states with the gradient of the stage's own terms."""
        assert self.whole is not None
        assert self.weights is not None
        share = batch.tokens.shape[0] / self.whole.sequences
        own = share * (self.weights.balance * output.balance_loss + self.weights.z * output.z_loss)
        self.figures[2] += output.balance_loss.detach() * share
        self.figures[[3 + place for place in self.places]] += output.broken.float()
        if not self.last:
            return _WithGradientOf.apply(output.logits, own)  # type: ignore[no-any-return, no-untyped-call]
        terms = losses(output, batch, self.whole, self.model.vocabulary_shard, self.model.sequence_shard)
        self.figures[:2] += torch.stack([terms.main, terms.mtp]).detach()
        return torch.stack([terms.main + self.weights.mtp * terms.mtp + own])


class _WithGradientOf(torch.autograd.Function):
    """x as it is; going backward, `term` is minimised too, as if it had been added to the loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, term: Tensor) -> Tensor:
        ctx.save_for_backward(term)
        # A copy, for FSDP registers hooks on what a stage gives out and wants no view there.
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], torch.ones_like(ctx.saved_tensors[0])


def prune(model: Transformer, layers: range, first: bool, last: bool) -> None:
    """Take out of a whole `model` what its stage does not have; names stay those of the whole.

    The last stage keeps the embedding for its MTP depths: a copy, whose gradient is added to the first's.
    """
    for name in list(model.layers):
        if int(name) not in layers:
            del model.layers[name]
    if not last:
        model.norm = model.head = None  # type: ignore[assignment]
        model.mtp = nn.ModuleList()
    if not first and not model.mtp:
        model.embedding = None  # type: ignore[assignment]


class Pipeline:
    """Cuts the model into stages and gives this rank its own."""

    def __init__(self, split: list[int] | None, stages_per_rank: int | None) -> None:
        self.split = split
        self.stages_per_rank = stages_per_rank

    def __call__(self, config: Config, mesh: ParallelMesh, device: torch.device) -> "PipelineForwardBackward":
        """Build this rank's stages of the configured model, wrapped and with their initial weights."""
        schedule, pp = config.parallel.schedule, mesh.degrees.pp
        group = mesh.dense.get_group("pp")
        per_rank = stages_per_rank(
            schedule, PipelineConfig(split=self.split, stages_per_rank=self.stages_per_rank)
        )
        layers = split_layers(config.model, pp * per_rank, self.split)
        numbers = stages_of_rank(schedule, group.rank(), pp, per_rank)
        stages = {n: _build(config, mesh, device, n, layers) for n in numbers}
        return PipelineForwardBackward(config, mesh, device, stages, len(layers))


def _build(
    config: Config, mesh: ParallelMesh, device: torch.device, number: int, layers: list[range]
) -> Stage:
    part = build_on_meta(config, device)
    first, last = number == 0, number == len(layers) - 1
    prune(part, layers[number], first, last)
    stage = Stage(part, first, last, config.data.document_mask)
    parallelize(part, stage, config, mesh, device)
    materialize(part, config.train.seed, device)
    if part.embedding is not None and not first:
        part.embedding.weight.is_replica = True  # type: ignore[attr-defined]
    return stage


class PipelineForwardBackward:
    """ForwardBackward of a model whose stages lie on the ranks of the `pp` axis."""

    def __init__(
        self, config: Config, mesh: ParallelMesh, device: torch.device, stages: dict[int, Stage], count: int
    ) -> None:
        self.stages = stages
        self.parts: list[Transformer] = [stage.model for stage in stages.values()]
        self.count = count
        self.group = mesh.dense.get_group("pp")
        self.checked = False
        train, degrees = config.train, mesh.degrees
        self.parts_of_a_row = degrees.cp * degrees.tp
        microbatches = train.batch // (train.microbatch * degrees.data_parallel)
        row = torch.empty(train.microbatch, train.length, dtype=torch.int64, device="meta")
        self.schedule, self.rank_of = self._schedule(config.parallel.schedule.name, row, device, microbatches)
        self.sending: list[tuple[Any, Tensor]] = []

    def _schedule(
        self, name: str, row: Tensor, device: torch.device, microbatches: int
    ) -> tuple[Any, dict[int, int]]:
        """PyTorch's schedule over this rank's stages, and which rank of the axis has which stage."""
        part = self.parts[0]
        shape = (row.shape[0], row.shape[1] // self.parts_of_a_row, part.config.dim)
        between = torch.empty(shape, dtype=part.compute_dtype, device="meta", requires_grad=True)
        total = torch.empty(1, device="meta", requires_grad=True)
        # With the shapes given PyTorch does not run the stages once more to find them out.
        pipeline_stages = [
            PipelineStage(
                stage, number, self.count, device,
                input_args=row if stage.first else between,
                output_args=total if stage.last else between,
                group=self.group,
            )
            for number, stage in self.stages.items()
        ]  # fmt: skip
        kind = get_schedule_class(name)
        given = pipeline_stages[0] if issubclass(kind, PipelineScheduleSingle) else pipeline_stages
        schedule = kind(given, microbatches, loss_fn=lambda out, _: out.sum(), scale_grads=False)
        return schedule, dict(pipeline_stages[0].stage_index_to_group_rank)

    def train(self, microbatches: list[Batch], whole: LossDenominators, weights: LossWeights) -> Tensor:
        """See ForwardBackward; all gradients are this rank's sums, reduced over its replicas at the end."""
        for stage in self.stages.values():
            stage.begin(whole, weights)
        tokens, targets, documents = (
            torch.cat([getattr(batch, name) for batch in microbatches])
            for name in ("tokens", "targets", "documents")
        )
        first, last = 0 in self.stages, self.count - 1 in self.stages
        try:
            self.schedule.step(
                *([tokens] if first else []),
                target=targets if last else None,
                tokens=tokens, targets=targets, documents=documents,
            )  # fmt: skip
        except RuntimeError as error:
            # PyTorch's tells the shapes of a stage's inputs; what went wrong there is behind it.
            raise error.__cause__ or error from None
        self._add_up_embedding()
        self._check_gradients()
        return torch.stack([stage.figures for stage in self.stages.values()]).sum(0)

    def evaluate(self, batch: Batch) -> Tensor:
        """See ForwardBackward."""
        x = self._forward(batch.tokens, batch.documents)
        if self.count - 1 not in self.stages:
            return torch.zeros((), device=x.device)
        part = self.stages[self.count - 1].model
        return part.vocabulary_shard.cross_entropy_sum(x, part.sequence_shard.take_local(batch.targets))

    def logits(self, tokens: Tensor) -> Tensor:
        """See ForwardBackward."""
        x = self._forward(tokens, None)
        config = self.parts[0].config
        if self.count - 1 in self.stages:
            part = self.stages[self.count - 1].model
            x = part.sequence_shard.gather(part.vocabulary_shard.gather(x)).contiguous()
        else:
            x = torch.empty(*tokens.shape, config.vocab_size, device=tokens.device)
        dist.broadcast(x, group=self.group, group_src=self.rank_of[self.count - 1])
        return x

    def _forward(self, tokens: Tensor, documents: Tensor | None) -> Tensor:
        """What this rank's last stage gives out, the stages in their order whatever the schedule."""
        own_rank = self.group.rank()
        x = torch.empty(len(tokens), tokens.shape[1] // self.parts_of_a_row, self.parts[0].config.dim,
                        dtype=self.parts[0].compute_dtype, device=tokens.device)  # fmt: skip
        for number, stage in sorted(self.stages.items()):
            if not stage.first and self.rank_of[number - 1] != own_rank:
                x = torch.empty_like(x)
                dist.recv(x, group=self.group, group_src=self.rank_of[number - 1])
            x = stage(x, tokens=tokens, documents=documents)
            if not stage.last and self.rank_of[number + 1] != own_rank:
                self._sent()
                work = dist.isend(x, group=self.group, group_dst=self.rank_of[number + 1])
                self.sending.append((work, x))
        if self.count - 1 in self.stages:
            self._sent()
        return x

    def _sent(self) -> None:
        for work, _ in self.sending:
            work.wait()
        self.sending.clear()

    def _add_up_embedding(self) -> None:
        """The gradient of the first stage's embedding and that of the last one's copy, both their sum."""
        if not self._copied:
            return
        ours = {n: local(require_gradient(s.model.embedding.weight)) for n, s in self._ends().items()}
        if len(ours) == 2:
            total = ours[0] + ours[self.count - 1]
        elif ours:
            (mine,) = ours.values()
            other = torch.empty_like(mine)
            peer = self.rank_of[self.count - 1 if 0 in ours else 0]
            operations = [
                dist.P2POp(dist.isend, mine, group=self.group, group_peer=peer),
                dist.P2POp(dist.irecv, other, group=self.group, group_peer=peer),
            ]
            for work in dist.batch_isend_irecv(operations):
                work.wait()
            total = mine + other
        for gradient in ours.values():
            gradient.copy_(total)

    @property
    def _copied(self) -> bool:
        return self.parts[0].config.mtp_depths > 0

    def _ends(self) -> dict[int, Stage]:
        return {n: stage for n, stage in self.stages.items() if n in (0, self.count - 1)}

    def _check_gradients(self) -> None:
        """RunFailed where a parameter got no gradient in the first step: a schedule may lose it silently."""
        if not self.checked:
            names = [name for part in self.parts for name, p in part.named_parameters() if p.grad is None]
            if names:
                raise RunFailed(f"{names[0]} got no gradient through the pipeline ({len(names)} in all)")
            self.checked = True


def require_gradient(parameter: Tensor) -> Tensor:
    """The gradient of a parameter that must have one."""
    assert parameter.grad is not None
    return parameter.grad
