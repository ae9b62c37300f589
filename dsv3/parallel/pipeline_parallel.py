"""Pipeline parallelism (PP) over torch.distributed.pipelining: stages of layers, and passes through them.

`Stage` is what a stage computes, `PipelineParallel` builds this rank's stages, and
`PipelineForwardBackward` runs the schedule.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from dsv3.checkpoint.state import local_tensor
from dsv3.config.parallel import PipelineConfig
from dsv3.config.root import Config
from dsv3.data.batch import Batch
from dsv3.distributed.torch_private import view_base
from dsv3.errors import RunFailed
from dsv3.model.head import HeadTargets
from dsv3.model.kv_cache import CacheStep
from dsv3.model.router import RouterStats
from dsv3.model.transfers import upload
from dsv3.model.transformer import LayerInputs, ModelOutput, Transformer, sum_stats
from dsv3.parallel.mesh import ParallelMesh
from dsv3.parallel.parallelize import build_on_meta, materialize, parallelize
from dsv3.planning.pipeline_stages import split_layers, stages_of_rank, stages_per_rank
from dsv3.training.loss import LossDenominators, LossSums, head_targets, loss_terms
from dsv3.training.schedule import StepHyperparameters
from dsv3.training.step import routers_by_place


class Stage(nn.Module):
    """A run of layers, with the embedding on the first stage and the head, MTP and the loss on the last.

    The first stage takes tokens, the others take hidden states [batch, sequence, dim]. The last one returns
    the loss to be minimised [1], or in evaluation mode the summed cross-entropy of the next token [1]. The
    others return hidden states. Every stage gets whole rows, a Batch: positions, masks and MTP need them.
    """

    def __init__(self, model: Transformer, first: bool, last: bool, document_mask: bool) -> None:
        super().__init__()
        self.model = model
        self.first = first
        self.last = last
        self.document_mask = document_mask
        self.places = torch.tensor(list(routers_by_place([model])), dtype=torch.int64, device="cpu")
        self.microbatches: list[Batch] = []
        self.all_tokens: Tensor | None = None
        self.denominators: LossDenominators | None = None
        self.step: StepHyperparameters | None = None
        self.sums = LossSums.zeros(0, torch.device("cpu"))

    def begin(
        self,
        microbatches: list[Batch],
        all_tokens: Tensor,
        denominators: LossDenominators,
        step: StepHyperparameters,
    ) -> None:
        """Set the next step's microbatches and what they are divided and weighted by; the sums start from 0.

        all_tokens: [rows of all microbatches, sequence], which PyTorch's schedule cuts into microbatches.
        """
        self.microbatches, self.all_tokens = microbatches, all_tokens
        self.denominators, self.step = denominators, step
        device = denominators.tokens.device
        self.sums = LossSums.zeros(self.model.config.num_moe_layers, device)
        self.places = upload(self.places, device)

    def forward(
        self,
        x: Tensor,
        tokens: Tensor,
        batch: Batch | None = None,
        cache: CacheStep | None = None,
    ) -> Tensor:
        """Compute the stage for `tokens` [batch, sequence]; in training those of one of the microbatches.

        `batch` has them in evaluation. With a `cache` (generation) the last stage returns the logits of each
        row's last token.
        """
        model = self.model
        batch = self._microbatch(tokens) if model.training else batch
        segments = batch.segments if batch is not None and self.document_mask else None
        lengths = None if batch is None else batch.lengths
        layer_inputs = model.layer_inputs(tokens, segments, cache, lengths)
        x = model.embed(model.shard_of_pass(cache).take_local(tokens)) if self.first else x
        x, stats = model.run_layers(x, layer_inputs, cache)
        if model.training:
            assert batch is not None
            return self._loss_or_hidden(x, stats, batch, layer_inputs)
        if not self.last:
            return x
        if cache is not None:
            return model.predict_next(x, cache)
        assert batch is not None
        output = model.predict(x, stats, tokens, layer_inputs, HeadTargets([batch.targets], [1.0]))
        assert output.head_loss is not None
        return output.head_loss.cross_entropies

    def _microbatch(self, tokens: Tensor) -> Batch:
        """Return the microbatch of `tokens`, a view of the step's: neither schedule nor FSDP hands on a
        Batch.

        As arguments its tensors would all be moved to the device, also those that the host wants to read.
        """
        assert view_base(tokens) is self.all_tokens, "the schedule copies what it cuts"
        return self.microbatches[tokens.storage_offset() // tokens.numel()]

    def _loss_or_hidden(
        self, x: Tensor, stats: list[RouterStats], batch: Batch, layer_inputs: LayerInputs
    ) -> Tensor:
        """Return the last stage's total loss [1], or hidden states that carry this stage's router loss."""
        assert self.denominators is not None
        assert self.step is not None
        output = ModelOutput(None, [], None, *sum_stats(stats, x))
        if self.last:
            depths = self.model.config.mtp_depths
            targets = head_targets(batch, self.denominators, self.step, depths)
            output = self.model.predict(x, stats, batch.tokens, layer_inputs, targets)
        terms = loss_terms(output, batch, self.denominators)
        for total, term in zip(self.sums[:3], (terms.main, terms.mtp, terms.balance), strict=True):
            total += term.detach()
        self.sums.nonfinite_routers.index_add_(0, self.places, output.nonfinite_routers.float())
        if not self.last:
            return _AttachLoss.apply(x, terms.router_loss(self.step))  # type: ignore[no-any-return, no-untyped-call]
        return torch.stack([terms.total(self.step)])


class _AttachLoss(torch.autograd.Function):
    """Return x unchanged; the backward pass minimises `term` too, as if it had been added to the loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, term: Tensor) -> Tensor:
        ctx.save_for_backward(term)
        # A copy: FSDP registers hooks on the output of a stage, which must not be a view.
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], torch.ones_like(ctx.saved_tensors[0])


def prune_to_stage(model: Transformer, layers: range, first: bool, last: bool) -> None:
    """Delete from a whole `model` what its stage does not have; the rest keeps its name.

    The last stage keeps a replica of the embedding for its MTP depths; its gradient is added to that of the
    first stage.
    """
    for name in list(model.layers):
        if int(name) not in layers:
            del model.layers[name]
    if not last:
        model.norm = model.head = None  # type: ignore[assignment]
        model.mtp = nn.ModuleList()
    if not first and not model.mtp:
        model.embedding = None  # type: ignore[assignment]


class PipelineParallel:
    """Wrapper that splits the model into stages and builds those of this rank."""

    def __init__(self, split: list[int] | None, stages_per_rank: int | None) -> None:
        self.split = split
        self.stages_per_rank = stages_per_rank

    def __call__(
        self, config: Config, mesh: ParallelMesh, device: torch.device, initial: bool = True
    ) -> "PipelineForwardBackward":
        """Build this rank's stages of the configured model, wrapped; see `materialize` for their weights."""
        schedule, pp = config.parallel.schedule, mesh.degrees.pp
        group = mesh.dense.get_group("pp")
        per_rank = stages_per_rank(
            schedule, PipelineConfig(split=self.split, stages_per_rank=self.stages_per_rank)
        )
        layers = split_layers(config.model, pp * per_rank, self.split)
        numbers = stages_of_rank(schedule, group.rank(), pp, per_rank)
        stages = {n: _build_stage(config, mesh, device, initial, n, layers) for n in numbers}
        return PipelineForwardBackward(config, mesh, device, stages, len(layers))


def _build_stage(
    config: Config, mesh: ParallelMesh, device: torch.device, initial: bool, number: int, layers: list[range]
) -> Stage:
    part = build_on_meta(config, device)
    first, last = number == 0, number == len(layers) - 1
    prune_to_stage(part, layers[number], first, last)
    stage = Stage(part, first, last, config.data.document_mask)
    parallelize(part, stage, config, mesh, device)
    materialize(part, config, mesh, device, initial)
    if part.embedding is not None and not first:
        part.embedding.weight.is_replica = True  # type: ignore[attr-defined]
    return stage


class PipelineForwardBackward:
    """The ForwardBackward of a model whose stages lie on the ranks of the `pp` axis."""

    def __init__(
        self, config: Config, mesh: ParallelMesh, device: torch.device, stages: dict[int, Stage], count: int
    ) -> None:
        self.stages = stages
        self.model_parts: list[Transformer] = [stage.model for stage in stages.values()]
        self.count = count
        self.group = mesh.dense.get_group("pp")
        self.gradients_checked = False
        train, degrees = config.train, mesh.degrees
        self.tp = degrees.tp
        self.sequence_shards = degrees.cp * degrees.tp
        self.num_microbatches = train.batch // (train.microbatch * degrees.data_parallel)
        row = torch.empty(train.microbatch, train.length, dtype=torch.int64, device="meta")
        self._schedule_of = partial(self._build_schedule, config.parallel.schedule.name, row, device)
        self.schedule, self.rank_of_stage = self._schedule_of(self.num_microbatches)
        self.pending_sends: list[tuple[Any, Tensor]] = []

    def _build_schedule(
        self, name: str, row: Tensor, device: torch.device, microbatches: int
    ) -> tuple[Any, dict[int, int]]:
        """Return PyTorch's schedule over this rank's stages, and the rank of the axis by stage number."""
        part = self.model_parts[0]
        shape = (row.shape[0], row.shape[1] // self.sequence_shards, part.config.dim)
        between = torch.empty(shape, dtype=part.compute_dtype, device="meta", requires_grad=True)
        total = torch.empty(1, device="meta", requires_grad=True)
        # Given the shapes, PyTorch does not run the stages once to infer them.
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

    def train(
        self, microbatches: list[Batch], denominators: LossDenominators, step: StepHyperparameters
    ) -> LossSums:
        """See ForwardBackward; all gradients are this rank's sums, reduced over its replicas at the end."""
        if len(microbatches) != self.num_microbatches:  # on every rank alike: the batch ramps up
            self.num_microbatches = len(microbatches)
            self.schedule, _ = self._schedule_of(self.num_microbatches)
        tokens = torch.cat([batch.tokens for batch in microbatches])
        for stage in self.stages.values():
            stage.begin(microbatches, tokens, denominators, step)
        first, last = 0 in self.stages, self.count - 1 in self.stages
        try:
            # The last stage returns its loss. PyTorch wants a target, which nobody reads.
            self.schedule.step(*([tokens] if first else []), target=tokens if last else None, tokens=tokens)
        except RuntimeError as error:
            # PyTorch's own error tells the shapes of a stage's inputs; its cause is what went wrong there.
            raise error.__cause__ or error from None
        self._sum_embedding_gradients()
        self._check_gradients()
        return LossSums.added_up([stage.sums for stage in self.stages.values()])

    def evaluate(self, batch: Batch) -> Tensor:
        """See ForwardBackward."""
        x = self._forward(batch.tokens, batch)
        return x.sum() if self.count - 1 in self.stages else torch.zeros((), device=x.device)

    def next_logits(self, tokens: Tensor, step: CacheStep) -> Tensor | None:
        """See ForwardBackward."""
        x = self._forward(tokens, cache=step)
        if self.count - 1 not in self.stages:
            return None
        return self.stages[self.count - 1].model.head.vocabulary_shard.gather(x)[:, -1]

    @property
    def head_rank(self) -> int:
        """See ForwardBackward."""
        return self.rank_of_stage[self.count - 1]

    def _forward(
        self,
        tokens: Tensor,
        batch: Batch | None = None,
        cache: CacheStep | None = None,
    ) -> Tensor:
        """Run this rank's stages in the order of their numbers, and return the output of the last one."""
        own_rank, part = self.group.rank(), self.model_parts[0]
        # Where they decode, context ranks have whole rows each.
        width = part.shard_of_pass(cache).take_local(tokens).shape[1] // self.tp
        shape = (len(tokens), width, part.config.dim)
        x = torch.empty(shape, dtype=part.compute_dtype, device=tokens.device)
        for number, stage in sorted(self.stages.items()):
            if not stage.first and self.rank_of_stage[number - 1] != own_rank:
                x = torch.empty_like(x)
                dist.recv(x, group=self.group, group_src=self.rank_of_stage[number - 1])
            x = stage(x, tokens=tokens, batch=batch, cache=cache)
            if not stage.last and self.rank_of_stage[number + 1] != own_rank:
                self._wait_for_sends()
                work = dist.isend(x, group=self.group, group_dst=self.rank_of_stage[number + 1])
                self.pending_sends.append((work, x))
        if self.count - 1 in self.stages:
            self._wait_for_sends()
        return x

    def _wait_for_sends(self) -> None:
        for work, _ in self.pending_sends:
            work.wait()
        self.pending_sends.clear()

    def _sum_embedding_gradients(self) -> None:
        """Set the gradients of the first stage's embedding and of the last one's replica to their sum."""
        if self.model_parts[0].config.mtp_depths == 0:
            return  # the last stage has no replica
        last = self.count - 1
        ours = {
            number: local_tensor(require_gradient(stage.model.embedding.weight))
            for number, stage in self.stages.items()
            if number in (0, last) and stage.model.embedding.weight.requires_grad
        }
        if len(ours) == 2:  # a V-shaped schedule puts both on one rank
            total = ours[0] + ours[last]
        elif ours:
            (mine,) = ours.values()
            other = torch.empty_like(mine)
            peer = self.rank_of_stage[last if 0 in ours else 0]
            operations = [
                dist.P2POp(dist.isend, mine, group=self.group, group_peer=peer),
                dist.P2POp(dist.irecv, other, group=self.group, group_peer=peer),
            ]
            for work in dist.batch_isend_irecv(operations):
                work.wait()
            total = mine + other
        for gradient in ours.values():
            gradient.copy_(total)

    def _check_gradients(self) -> None:
        """Raise RunFailed if a parameter got no gradient in the first step: a schedule may lose one."""
        if not self.gradients_checked:
            named = [item for part in self.model_parts for item in part.named_parameters()]
            names = [name for name, p in named if p.requires_grad and p.grad is None]
            if names:
                raise RunFailed(f"{names[0]} got no gradient through the pipeline ({len(names)} in all)")
            self.gradients_checked = True


def require_gradient(parameter: Tensor) -> Tensor:
    """Return the gradient of a parameter that must have one."""
    assert parameter.grad is not None
    return parameter.grad
