"""One optimizer step: forward and backward over the microbatches, clip, update, move the biases."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3.config.training import TrainConfig
from dsv3.data.batch import Batch
from dsv3.distributed.process_group import RankContext
from dsv3.fp8.convert_model import engine_of, take_broken_tiles
from dsv3.metrics import expert_load
from dsv3.training.expert_bias import selection_biases, take_load, update_biases
from dsv3.training.forward_backward import ForwardBackward, LossWeights, placed_routers
from dsv3.training.loss import LossDenominators, valid_tokens
from dsv3.training.optimizer import clip_gradients, set_learning_rate


@dataclass(frozen=True)
class Weights:
    """What a step's loss terms and its bias update are weighed with."""

    lr: float
    mtp: float
    balance: float
    bias_speed: float
    z: float = 0.0

    @classmethod
    def at(cls, step: int, total_steps: int, lr: float, config: TrainConfig) -> "Weights":
        """The weights of `step` (from 1) in a run of `total_steps`."""
        share = step / total_steps
        mtp, balance = config.mtp_loss, config.balance
        mtp_weight = mtp.weight if share <= mtp.switch_at else mtp.final_weight
        bias_speed = balance.bias_speed if share <= balance.bias_until else 0.0
        return cls(lr, mtp_weight, balance.loss_weight, bias_speed, balance.z_loss_weight)


class TrainStep:
    """Carries out optimizer steps; all ranks call it together."""

    def __init__(
        self,
        forward_backward: ForwardBackward,
        optimizer: torch.optim.Optimizer,
        ranks: RankContext,
        clip_norm: float,
    ) -> None:
        self.forward_backward = forward_backward
        self.optimizer = optimizer
        self.ranks = ranks
        self.clip_norm = clip_norm
        self.config = forward_backward.parts[0].config
        self.routers = placed_routers(forward_backward.parts)
        self.in_fp8 = engine_of(forward_backward.parts) is not None

    def __call__(self, microbatches: list[Batch], weights: Weights) -> dict[str, Tensor]:
        """Train on this rank's microbatches of one global batch.

        Returns the figures of metrics/row.py as tensors, still on the device: reading them is what
        would make the host wait.
        """
        for part in self.forward_backward.parts:
            part.train()
        for router in self.routers.values():
            router.z_loss = weights.z > 0
        microbatches = [batch.to(self.ranks.device) for batch in microbatches]
        terms = LossWeights(weights.mtp, weights.balance, weights.z)
        parts = self.forward_backward.train(microbatches, self._measure(microbatches), terms)
        parts[:2] /= self.ranks.loss_replicas
        if self.in_fp8:  # they travel with the losses: one reduction for all
            parts = torch.cat(
                [parts, take_broken_tiles(self.forward_backward.parts, self.ranks.device).view(1)]
            )
        main, mtp, balance, *broken = self.ranks.sum(parts).unbind()
        grad_norm = clip_gradients(self.forward_backward.parts, self.clip_norm, self.ranks)
        set_learning_rate(self.optimizer, weights.lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        figures = {"loss": main, "grad_norm": grad_norm}
        if self.in_fp8:
            figures["fp8_broken_tiles"] = broken.pop()
        if self.config.mtp_depths:
            figures["mtp_loss"] = mtp
        if self.config.num_moe_layers:
            figures["balance_loss"] = balance * weights.balance
            figures |= self._balance(weights.bias_speed)
            figures["broken_router"] = _first(torch.stack(broken) > 0)
        return figures

    def _measure(self, microbatches: list[Batch]) -> LossDenominators:
        local = torch.stack([valid_tokens(batch) for batch in microbatches]).sum()
        sequences = sum(batch.tokens.shape[0] for batch in microbatches) * self.ranks.data_world
        tokens = self.ranks.sum(local) // self.ranks.row_replicas
        return LossDenominators(tokens.clamp(min=1), sequences)

    def _balance(self, bias_speed: float) -> dict[str, Tensor]:
        shape = (self.config.num_moe_layers, self.config.moe.num_experts)
        load = take_load(self.routers, shape, self.ranks.sum, self.ranks.device)
        update_biases(self.routers, load, bias_speed)
        figures = {
            "moe_max_violation": expert_load.max_violation(load),
            "moe_entropy": expert_load.entropy(load),
        }
        if self.config.moe.selection_bias:
            figures["moe_bias_range"] = self.ranks.max(expert_load.bias_range(selection_biases(self.routers)))
        return figures


def _first(flags: Tensor) -> Tensor:
    """The place of the first True in `flags` [count], -1 where there is none; a scalar."""
    return torch.where(flags.any(), flags.int().argmax(), -1)
