"""The closed forms against what autograd saves, on the debug model on CPU, as a rank of a layout."""

from collections.abc import Iterator
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from dsv3.config.model import ModelConfig
from dsv3.config.parallel import SavedOp
from dsv3.model.initialization import initialize
from dsv3.model.transformer import Transformer
from dsv3.parallel.context_parallel import ContextParallel, join_sequence_shards
from dsv3.parallel.mesh import ParallelMesh
from dsv3.parallel.tensor_parallel import TensorParallel
from dsv3.planning import parameters
from dsv3.planning.activations import Activations, TokenBytes
from dsv3.planning.dispatch_volume import dispatch_probability
from dsv3.planning.layout import ParallelDims
from dsv3.planning.parameters import Component
from dsv3.planning.sharding import local_numel
from tests.planning.presets import preset

ROWS, LENGTH = 2, 64
TOKENS = ROWS * LENGTH
DEBUG = preset("debug")


LAYOUTS = [  # one process is in test_live_memory.py
    ParallelDims(tp=2),
    ParallelDims(cp=2),
    ParallelDims(cp=2, tp=2),
    ParallelDims(cp=4),
]


@pytest.fixture(autouse=True)
def _ranks(request: pytest.FixtureRequest) -> Iterator[None]:
    """This process as rank 0 of a layout whose other ranks do not exist: nothing is sent."""
    degrees = getattr(request.node, "callspec", None) and request.node.callspec.params.get("degrees")
    if not degrees or degrees.world_size == 1:
        yield
        return
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=degrees.world_size)
    yield
    torch.distributed.destroy_process_group()


def saved_bytes(config: ModelConfig, dtype: torch.dtype, degrees: ParallelDims) -> int:
    """Bytes of the distinct storages that a forward pass of rank 0 saves, parameters left out."""
    known = {f.name: getattr(config, f.name) for f in fields(config) if not f.name.startswith("_")}
    model = Transformer(**known, compute_dtype=dtype)
    initialize(model, seed=0)
    if degrees.world_size > 1:
        mesh = ParallelMesh(degrees, "cpu")
        TensorParallel()(model, mesh)
        ContextParallel()(model, mesh)
        join_sequence_shards(model, mesh)
    local = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    own = {p.untyped_storage().data_ptr() for p in local}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept.setdefault(storage.data_ptr(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(torch.arange(TOKENS).view(ROWS, LENGTH))
        assert (output.logits.logsumexp(-1).sum() + output.balance_loss).requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def saved_by_a_block(dtype: torch.dtype, dense: bool, degrees: ParallelDims) -> int:
    """Bytes that one more layer saves, without its weights' casts."""
    layers = [replace(DEBUG, num_layers=n, num_dense_layers=n if dense else 0, mtp_depths=0) for n in (1, 2)]
    one, two = (saved_bytes(config, dtype, degrees) for config in layers)
    cast = [w for w in parameters.block(DEBUG, dense) if w.is_matrix and w.component is not Component.router]
    casts = sum(local_numel(w, degrees) for w in cast) * 2 if dtype is torch.bfloat16 else 0
    return two - one - casts


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "moe"])
@pytest.mark.parametrize("degrees", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_block_saves_what_is_counted(dtype: torch.dtype, degrees: ParallelDims, dense: bool) -> None:
    # In fp32 casts are no copies, so that a few tensors are kept which bf16 frees.
    tolerance = 0.06 if dtype is torch.float32 else 0.002
    counted = Activations(DEBUG, dtype.itemsize, fused_kernels=False, degrees=degrees).block(dense)
    tokens = TOKENS // degrees.cp
    saved = saved_by_a_block(dtype, dense, degrees)
    assert saved == pytest.approx(counted.on_rank(tokens, degrees.tp), rel=tolerance)


def test_a_prediction_keeps_its_norm_and_a_gradient_but_no_logits() -> None:
    # Input of the norm in fp32 and its rms on a tp rank's own tokens, a gradient in bf16 on those of all.
    assert Activations(DEBUG, 2).prediction() == TokenBytes(4 * DEBUG.dim + 4, 2 * DEBUG.dim)
    assert Activations(DEBUG, 2).block_input() == TokenBytes(2 * DEBUG.dim)


BLOCK = {"dense": True, "moe": False}


def bytes_a_token(degrees: ParallelDims, name: str = "671b", dense: bool = False) -> TokenBytes:
    return Activations(preset(name), 2, degrees=degrees).block(dense)


def test_tp_ranks_share_a_part_and_gather_latents_or_hidden_states() -> None:
    moe, one = bytes_a_token(ParallelDims(tp=2)), bytes_a_token(ParallelDims())
    # Latents of queries (1536) and of keys and values (512 + 64): gathered, no longer saved on their own.
    assert (moe.replicated, one.sharded - moe.sharded) == (2 * (1536 + 512 + 64), 2 * (1536 + 512))
    assert one.replicated == 0
    # Without a latent of the queries the hidden states are gathered in its place.
    assert bytes_a_token(ParallelDims(tp=2), "16b").replicated == 2 * (2048 + 512 + 64)
    dense = bytes_a_token(ParallelDims(tp=2), dense=True)
    assert dense.replicated - moe.replicated == 2 * 7168
    assert TokenBytes(7, 3).on_rank(5, 4) == 9 + 15
    assert TokenBytes(1, 2) + TokenBytes(3, 4) == TokenBytes(4, 6)


def test_cp_expands_the_keys_of_the_whole_row_from_gathered_latents() -> None:
    one, four = bytes_a_token(ParallelDims()), bytes_a_token(ParallelDims(cp=4))
    keys_values = 2 * 128 * (192 + 128 + 128)
    outputs_again, own_latent = 2 * 128 * 128, 2 * 512
    assert four.sharded - one.sharded == 3 * keys_values + outputs_again - own_latent
    assert four.replicated == 4 * 2 * (512 + 64)


@pytest.mark.parametrize("dense", BLOCK.values(), ids=BLOCK)
def test_selective_recomputation_keeps_what_is_named(dense: bool) -> None:
    config = preset("671b")
    saved = Activations(config, 2, degrees=ParallelDims(ep=4, dp_shard=4))

    def more(*keep: SavedOp) -> int:
        kept, none = saved.selective(dense, keep), saved.block_input()
        return kept.sharded + kept.replicated - none.sharded - none.replicated

    assert more() == 0
    assert more(SavedOp.attention) == 128 * (2 * 128 + 4)
    assert more(SavedOp.experts) == (0 if dense else 8 * 2 * (2 * 2048 + 7168))
    # Hit are 3.77 of 4 ranks: group-limited, each with 2 of the 8 groups of which 4 are open.
    copies = 4 * dispatch_probability(config.moe, 64)
    assert more(SavedOp.exchange) == (0 if dense else round(copies * (2 * 2 * 7168 + 2 * 4 * 64)))
    ffn = 2 * 18432 + 7168 if dense else 2 * 2048 + 7168 + 2 * 256
    attention = 1536 + 512 + 64 + 128 * (192 + 256) + 7168
    assert more(SavedOp.matmuls) == 2 * (attention + ffn)
    assert more(*SavedOp) == sum(map(more, SavedOp))
    whole = saved.block(dense)
    assert more(SavedOp.attention, SavedOp.experts) < (whole.sharded + whole.replicated) / 2
