"""One optimizer step: forward and backward over the microbatches (gradient accumulation), clip, update.

After the update the expert bias moves (aux-loss-free load balancing, expert_bias.py).
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dsv3.data.batch import Batch
from dsv3.distributed.process_group import RankContext
from dsv3.fp8.convert_model import fp8_engine_name, take_nonfinite_tiles
from dsv3.metrics import expert_load
from dsv3.model.attention_kernels import Segments
from dsv3.model.generation import last_logits
from dsv3.model.head import HeadTargets
from dsv3.model.kv_cache import CacheStep
from dsv3.model.router import Router
from dsv3.model.transfers import upload
from dsv3.model.transformer import ModelOutput, Transformer
from dsv3.training.expert_bias import stack_expert_bias, take_expert_load, update_expert_bias
from dsv3.training.gradient_places import GradientPlaces
from dsv3.training.loss import LossDenominators, LossSums, head_targets, loss_terms, valid_tokens
from dsv3.training.optimizer import gradient_norm, scale_gradients, set_learning_rate
from dsv3.training.schedule import StepHyperparameters
from dsv3.training.step_guard import StepGuard, Verdict


class ForwardBackward(Protocol):
    """Takes microbatches through the model: whole (below), or in stages (parallel/pipeline_parallel.py)."""

    model_parts: list[Transformer]
    """What this rank holds of the model: all of it, or its pipeline stages."""
    head_rank: int
    """Pipeline rank that has the head."""

    def train(
        self, microbatches: list[Batch], denominators: LossDenominators, step: StepHyperparameters
    ) -> LossSums:
        """Accumulate the gradients of this rank's `microbatches`; return their loss sums."""

    def evaluate(self, batch: Batch) -> Tensor:
        """Return the summed next-token cross-entropy of `batch`, 0 where another rank has it; a scalar."""

    def next_logits(self, tokens: Tensor, step: CacheStep) -> Tensor | None:
        """Return the logits [batch, vocab] after each row's last token, None on ranks without the head.

        `tokens` [batch, sequence] follow those in the cache; `step` has this rank's layers of it.
        """


class LocalForwardBackward:
    """Runs a model without pipeline stages: one forward and one backward per microbatch."""

    def __init__(self, model: Transformer, document_mask: bool) -> None:
        self.model = model
        self.model_parts = [model]
        self.head_rank = 0
        self.document_mask = document_mask

    def train(
        self, microbatches: list[Batch], denominators: LossDenominators, step: StepHyperparameters
    ) -> LossSums:
        """See ForwardBackward."""
        sums = []
        for batch in microbatches:
            targets = head_targets(batch, denominators, step, self.model.config.mtp_depths)
            output = self.model(batch.tokens, self._documents(batch), targets=targets, lengths=batch.lengths)
            terms = loss_terms(output, batch, denominators)
            terms.total(step).backward()  # gradients accumulate over the microbatches
            nonfinite = output.nonfinite_routers.float()
            sums.append(LossSums(terms.main, terms.mtp, terms.balance.detach(), nonfinite))
        return LossSums.added_up(sums)

    def evaluate(self, batch: Batch) -> Tensor:
        """See ForwardBackward."""
        targets = HeadTargets([batch.targets], [1.0])
        output: ModelOutput = self.model(
            batch.tokens, self._documents(batch), targets=targets, lengths=batch.lengths
        )
        assert output.head_loss is not None
        return output.head_loss.loss

    def next_logits(self, tokens: Tensor, step: CacheStep) -> Tensor | None:
        """See ForwardBackward."""
        return self.model.head.vocabulary_shard.gather(last_logits(self.model, tokens, step))

    def _documents(self, batch: Batch) -> Segments | None:
        return batch.segments if self.document_mask else None


class StepMetrics(NamedTuple):
    """Measurements of one optimizer step; scalars on the device, None where the model has no such thing.

    Scalars are the same on all ranks. The names are those of metrics/row.py. Reading a value makes the host
    wait for the device.
    """

    loss: Tensor
    grad_norm: Tensor
    mtp_loss: Tensor | None = None
    balance_loss: Tensor | None = None
    moe_max_violation: Tensor | None = None
    moe_entropy: Tensor | None = None
    moe_bias_range: Tensor | None = None
    fp8_broken_tiles: Tensor | None = None
    padding: Tensor | None = None
    targets: Tensor | None = None
    """Valid targets of the global batch; where it has none, `loss` and `mtp_loss` are means of nothing."""
    first_nonfinite_router: Tensor | None = None
    """Place among all MoE layers of the first router whose logits were not finite, -1 for none."""
    accident: Tensor | None = None
    """Verdict on the step: GOOD, NONFINITE or SPIKE (step_guard.py)."""
    skip: Tensor | None = None
    """Whether the step was kept out of parameters, optimizer and biases; bool."""
    spike_limit: Tensor | None = None
    """Norm from which on the step would have been a spike."""
    gradient_places: Tensor | None = None
    """Norms of this rank's gradients [places] (gradient_places.py); on CPU of a skipped step alone."""

    def known(self) -> dict[str, Tensor]:
        """Return by name what this model has."""
        return {name: value for name, value in self._asdict().items() if value is not None}


class TrainStep:
    """Takes optimizer steps; all ranks call it together."""

    def __init__(
        self,
        forward_backward: ForwardBackward,
        optimizer: torch.optim.Optimizer,
        ranks: RankContext,
        clip_norm: float,
        guard: StepGuard | None = None,
    ) -> None:
        self.forward_backward = forward_backward
        self.model_parts = forward_backward.model_parts
        self.optimizer = optimizer
        self.ranks = ranks
        self.clip_norm = clip_norm
        self.guard = guard
        """Keeps bad steps out; None takes every step."""
        self.places = GradientPlaces(self.model_parts)
        self.config = self.model_parts[0].config
        self.routers = routers_by_place(self.model_parts)
        self.in_fp8 = fp8_engine_name(self.model_parts) is not None

    def __call__(self, microbatches: list[Batch], step: StepHyperparameters) -> StepMetrics:
        """Train on this rank's microbatches of one global batch."""
        for part in self.model_parts:
            part.train()
        for router in self.routers.values():
            router.z_loss = step.z_loss_weight > 0
        microbatches = [batch.to(self.ranks.device) for batch in microbatches]
        counts_of_batch = self._count(microbatches)
        denominators = LossDenominators(*counts_of_batch.clamp(min=1).unbind())
        local = self.forward_backward.train(microbatches, denominators, step)
        # Every rank of a tensor-parallel group computes the same cross-entropies.
        local = local._replace(
            main=local.main / self.ranks.loss_replicas, mtp=local.mtp / self.ranks.loss_replicas
        )
        flat = local.flat()
        counts = [take_nonfinite_tiles(self.model_parts, self.ranks.device).view(1)] if self.in_fp8 else []
        summed = self.ranks.sum(torch.cat([flat, *counts]))  # the count travels with the losses
        sums = LossSums.from_flat(summed[: len(flat)])
        metrics = StepMetrics(
            sums.main,
            gradient_norm(self.model_parts, self.ranks),
            fp8_broken_tiles=summed[-1] if counts else None,
            padding=self._padding(microbatches, counts_of_batch[2]),
            targets=counts_of_batch[0],
        )
        set_learning_rate(self.optimizer, step.lr)
        if self.guard is None:
            scale_gradients(self.model_parts, metrics.grad_norm, self.clip_norm)
            self.optimizer.step()
        else:
            finite = summed[:3].isfinite().all()  # the three losses
            if counts:
                finite = finite & ~(summed[-1] > 0)  # NaN: their number is unknown
            verdict = self.guard.judge(finite, metrics.grad_norm, counts_of_batch[0] > 0)
            metrics = self._update(self.guard, verdict, metrics)
        self.optimizer.zero_grad(set_to_none=True)
        if self.config.mtp_depths:
            metrics = metrics._replace(mtp_loss=sums.mtp)
        if self.config.num_moe_layers:
            nonfinite = sums.nonfinite_routers > 0
            metrics = metrics._replace(
                balance_loss=sums.balance * step.balance_weight,
                first_nonfinite_router=torch.where(nonfinite.any(), nonfinite.int().argmax(), -1),
                **self._balance_experts(step.bias_speed, metrics.skip),
            )
        return metrics

    def _update(self, guard: StepGuard, verdict: Verdict, metrics: StepMetrics) -> StepMetrics:
        """Clip the gradients and take the optimizer's step, unless the verdict is to skip it."""
        metrics = metrics._replace(accident=verdict.kind, skip=verdict.skip, spike_limit=verdict.limit)
        if guard.asks_host:
            if verdict.skip.item():
                return metrics._replace(gradient_places=self.places.measure())
            scale_gradients(self.model_parts, metrics.grad_norm, self.clip_norm)
            self.optimizer.step()
            return metrics
        metrics = metrics._replace(gradient_places=self.places.measure())
        scale_gradients(self.model_parts, metrics.grad_norm, self.clip_norm)
        guard.step(verdict.skip)
        return metrics

    def _count(self, microbatches: list[Batch]) -> Tensor:
        """Return the fields of LossDenominators [3] as they are counted over all ranks, 0 included.

        Padding may differ between ranks, so they exchange all three counts wherever it stands.
        """
        valid = torch.stack([valid_tokens(batch) for batch in microbatches]).sum()
        of_rows = [(batch.num_sequences, batch.num_tokens) for batch in microbatches]
        counts = upload(torch.tensor(of_rows).sum(0), self.ranks.device)
        return self.ranks.sum(torch.cat([valid.view(1), counts])) // self.ranks.row_replicas

    def _padding(self, microbatches: list[Batch], tokens: Tensor) -> Tensor:
        """Return the share of the global batch's places that hold no token."""
        places = sum(batch.tokens.numel() for batch in microbatches) * self.ranks.data_world
        return 1 - tokens / places

    def _balance_experts(self, bias_speed: float, skip: Tensor | None) -> dict[str, Tensor]:
        """Move the expert bias by the global batch's load unless `skip`; return the metrics of the load."""
        shape = (self.config.num_moe_layers, self.config.moe.num_experts)
        load = take_expert_load(self.routers, shape, self.ranks.sum, self.ranks.device)
        update_expert_bias(self.routers, load, bias_speed, skip)
        metrics = {
            "moe_max_violation": expert_load.max_violation(load),
            "moe_entropy": expert_load.entropy(load),
        }
        if self.config.moe.selection_bias:
            largest = expert_load.bias_range(stack_expert_bias(self.routers, self.ranks.device))
            metrics["moe_bias_range"] = self.ranks.max(largest)
        return metrics


def routers_by_place(model_parts: list[Transformer]) -> dict[int, Router]:
    """Return the routers of `model_parts` by their place among the whole model's MoE layers, MTP's last."""
    return {
        part.config.moe_layers().index(name): router
        for part in model_parts
        for name, router in zip(part.moe_layers(), part.routers(), strict=True)
    }
