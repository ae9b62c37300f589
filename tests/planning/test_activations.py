"""The closed forms against what autograd saves, on the debug model on CPU."""

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from dsv3.model.config import ModelConfig
from dsv3.model.initialization import initialize
from dsv3.model.transformer import Transformer
from dsv3.planning import weights
from dsv3.planning.activations import Activations, TokenBytes
from dsv3.planning.weights import Component
from tests.planning.presets import preset

ROWS, LENGTH = 2, 64
TOKENS = ROWS * LENGTH
DEBUG = preset("debug")


def saved_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of the distinct storages that a forward pass saves, parameters left out."""
    known = {f.name: getattr(config, f.name) for f in fields(config) if not f.name.startswith("_")}
    model = Transformer(**known, compute_dtype=dtype)
    initialize(model, seed=0)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
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


def saved_by_a_block(dtype: torch.dtype, dense: bool) -> float:
    """Bytes a token that one more layer saves, without its weights' casts."""
    layers = [replace(DEBUG, num_layers=n, num_dense_layers=n if dense else 0, mtp_depths=0) for n in (1, 2)]
    one, two = (saved_bytes(config, dtype) for config in layers)
    cast = [w for w in weights.block(DEBUG, dense) if w.is_matrix and w.component is not Component.router]
    casts = sum(w.numel for w in cast) * 2 if dtype is torch.bfloat16 else 0
    return (two - one - casts) / TOKENS


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_block_saves_what_is_counted(dtype: torch.dtype, dense: bool) -> None:
    # In fp32 casts are no copies, so that a few tensors are kept which bf16 frees.
    tolerance = 0.03 if dtype is torch.float32 else 0.002
    counted = Activations(DEBUG, dtype.itemsize, fused_kernels=False).block(dense)
    assert saved_by_a_block(dtype, dense) == pytest.approx(counted.split + counted.whole, rel=tolerance)


def test_logits_are_fp32_whatever_the_compute_dtype() -> None:
    assert Activations(DEBUG, 2).logits().split > 2 * 4 * DEBUG.vocab_size
    assert Activations(DEBUG, 2).block_input() == TokenBytes(2 * DEBUG.dim)


def test_tp_ranks_share_a_part_and_repeat_the_latents() -> None:
    block = Activations(preset("671b"), 2).block(dense=False)
    # At least the latents (1536 + 512) and the gathered input in bf16 are whole on every rank.
    assert 2 * (1536 + 512 + 7168) <= block.whole < block.split / 10
    assert TokenBytes(7, 3).on_rank(5, 4) == 9 + 15
    assert TokenBytes(1, 2) + TokenBytes(3, 4) == TokenBytes(4, 6)
