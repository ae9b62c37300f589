"""Expert parallelism (EP): shard the routed experts over `ep` ranks and dispatch tokens between them.

This file places the experts; token_dispatch.py (all-to-all) and deepep.py (DeepEP) move the tokens.
"""

from functools import partial

from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor

from dsv3.config.parallel import DispatchBackend
from dsv3.model.moe import Experts, MoE, RowCounts, TokenDispatcher, apply_experts
from dsv3.model.transformer import Transformer
from dsv3.parallel.deepep import DeepEPTokenDispatcher
from dsv3.parallel.mesh import ParallelMesh
from dsv3.parallel.token_dispatch import AllToAllTokenDispatcher


class ExpertParallel:
    """Wrapper that shards experts over the `ep` axis and gives every MoE layer a token dispatcher."""

    def __init__(self, backend: DispatchBackend, ranks_per_node: int | None) -> None:
        self.backend = backend
        self.ranks_per_node = ranks_per_node

    def __call__(self, model: Transformer, mesh: ParallelMesh) -> None:
        """Wrap `model` in place where `ep` is above 1."""
        if mesh.degrees.ep == 1:
            return
        dispatcher: TokenDispatcher
        if self.backend is DispatchBackend.all_to_all:
            dispatcher = AllToAllTokenDispatcher(mesh.expert_groups)
        else:
            dispatcher = DeepEPTokenDispatcher.from_mesh(mesh, model.config.dim)
        for module in model.modules():
            if isinstance(module, MoE):
                experts = module.experts
                for name, weight in list(experts.named_parameters()):
                    shard = distribute_tensor(weight, mesh.expert["ep"], [Shard(0)], src_data_rank=None)
                    experts.register_parameter(name, nn.Parameter(shard))
                experts.forward = partial(_apply_local_experts, experts)  # type: ignore[method-assign]
                module.dispatcher = dispatcher


def _apply_local_experts(experts: Experts, rows: Tensor, counts: RowCounts) -> Tensor:
    weights = (experts.gate_up_proj.to_local(), experts.down_proj.to_local())  # type: ignore[attr-defined]
    return apply_experts(rows, counts, *weights, experts.matmul)


def dispatch_in_fp8(model: Transformer, power_of_two: bool) -> None:
    """Send rows to experts in FP8 in every MoE layer whose experts live on several ranks."""
    for module in model.modules():
        if isinstance(module, MoE) and isinstance(
            module.dispatcher, AllToAllTokenDispatcher | DeepEPTokenDispatcher
        ):
            module.dispatcher.dispatch_in_fp8(power_of_two)
