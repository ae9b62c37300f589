"""Padded rows through router and experts: as the rows cut to their tokens, and no expert computes padding."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv3.config.model import MoEConfig
from dsv3.model.moe import MoE
from dsv3.model.padding import PaddingMask, padding_mask, put_tokens, take_tokens
from dsv3.model.router import LocalRouterReduction, Router
from tests import reference
from tests.reference import MOE, SOFTMAX_MOE, assert_close, assert_same_gradients, normal

LENGTHS = [9, 4, 0, 1]
CONFIGS = {
    "v3": MOE,
    "v2 with two shared experts": SOFTMAX_MOE,
    "no shared expert": replace(MOE, num_shared_experts=0),
}


def mask(lengths: list[int], positions: Tensor | None = None) -> PaddingMask:
    """Return the mask of rows of 9 positions, or of some of these."""
    places = torch.arange(9) if positions is None else positions
    return padding_mask(lengths, places, torch.device("cpu"))


def layer(config: MoEConfig) -> MoE:
    module = MoE(32, config)
    reference.randomize(module)
    return module


@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_computes_padded_rows_as_a_loop_does_the_cut_ones(name: str) -> None:
    module, x, padding = layer(CONFIGS[name]), normal(4, 9, 32), mask(LENGTHS)
    found, stats = module(x, padding)
    cut = [reference.moe(module, x[b : b + 1, :n]) for b, n in enumerate(LENGTHS) if n]
    expected = torch.cat([out[0] for out, _, _ in cut])
    assert_close(found[padding.is_token], expected)
    assert_same_gradients(found[padding.is_token], expected, [x, *module.parameters()])
    assert torch.equal(stats.load, torch.stack([load for _, load, _ in cut]).sum(0))
    # A row of padding alone is no sequence.
    term = torch.stack([term for _, _, term in cut]).mean()
    assert_close(stats.balance_loss, term)
    assert_same_gradients(stats.balance_loss, term, [x, module.router.weight])


def test_no_expert_computes_padding() -> None:
    module, padding, seen = layer(replace(MOE, num_shared_experts=0)), mask(LENGTHS), []
    module.experts.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    out, _ = module(normal(4, 9, 32), padding)
    assert [len(rows) for rows in seen] == [sum(LENGTHS) * MOE.top_k]
    assert not out[~padding.is_token].any()
    assert out[padding.is_token].any(-1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_of_padding_alone_gives_every_weight_a_zero_gradient(dtype: torch.dtype) -> None:
    module = layer(replace(MOE, num_shared_experts=0))
    module.router.z_loss = True
    out, stats = module(normal(2, 9, 32).to(dtype), mask([0, 0]))
    (out.sum() + stats.balance_loss + stats.z_loss).backward()
    for weight in module.parameters():
        assert weight.grad is not None
        assert not weight.grad.any()
    assert not stats.load.any()


class Half(LocalRouterReduction):
    """One of two ranks of each row; counts of the other have been added up before."""

    shards = 2

    def __init__(self, others: Tensor | None = None) -> None:
        self.others = others
        self.own = torch.zeros(0)

    def sum(self, counts: Tensor) -> Tensor:
        self.own = counts
        return counts if self.others is None else counts + self.others


def test_the_routers_losses_are_means_over_tokens_and_sequences_and_add_up_over_shards() -> None:
    router, x = Router(32, MOE), normal(4, 9, 32).detach()
    reference.randomize(router)
    router.z_loss = True
    cut = [(n, router(x[b : b + 1, :n]).stats) for b, n in enumerate(LENGTHS) if n]
    z = sum(n * stats.z_loss for n, stats in cut) / sum(LENGTHS)
    balance = sum(stats.balance_loss for _, stats in cut) / 3
    whole = router(x, mask(LENGTHS)).stats
    assert_close(whole.z_loss, z)
    assert_close(whole.balance_loss, balance)
    halves = [torch.tensor([0, 1, 7, 8]), torch.tensor([2, 3, 4, 5, 6])]  # a zigzag, and uneven
    counts = []
    for half in halves:
        router.reduction = Half()
        router(x[:, half], mask(LENGTHS, half))
        counts.append(router.reduction.own)
    found = []
    for half, other in zip(halves, reversed(counts), strict=True):
        router.reduction = Half(other)
        found.append(router(x[:, half], mask(LENGTHS, half)).stats)
    assert_close(found[0].z_loss + found[1].z_loss, z)
    assert_close(found[0].balance_loss + found[1].balance_loss, balance)
    assert torch.equal(found[0].load + found[1].load, whole.load)


def test_full_rows_are_those_without_a_mask() -> None:
    module, x = layer(MOE), normal(2, 9, 32)
    module.router.z_loss = True
    (found, stats), (expected, plain) = module(x, mask([9, 9])), module(x)
    assert torch.equal(found, expected)
    assert torch.equal(stats.load, plain.load)
    assert_close(stats.balance_loss, plain.balance_loss)
    assert_close(stats.z_loss, plain.z_loss)


def test_forced_balance_loads_experts_evenly_to_a_token_a_row_and_no_padding() -> None:
    module = layer(replace(MOE, forced_balance=True))
    _, stats = module(normal(4, 9, 32), mask(LENGTHS))
    assert stats.load.sum() == sum(LENGTHS) * MOE.top_k
    assert stats.load.max() - stats.load.min() <= sum(n > 0 for n in LENGTHS)


def test_tokens_are_taken_and_put_back_and_their_gradients_too() -> None:
    padding = mask(LENGTHS)
    x = torch.randn(36, 2, dtype=torch.float64, requires_grad=True)
    rows = take_tokens(x, padding)
    is_token = padding.is_token.flatten()
    assert torch.equal(rows, x[is_token])
    assert torch.equal(put_tokens(rows, padding), x.where(is_token.unsqueeze(1), 0))
    assert torch.autograd.gradcheck(lambda x: take_tokens(x, padding), (x,))
    assert torch.autograd.gradcheck(lambda rows: put_tokens(rows, padding), (rows.detach().requires_grad_(),))


def test_padding_makes_autograd_keep_no_more_rows() -> None:
    module, x, kept = layer(MOE), normal(2, 9, 32), []
    for padding in (None, mask([9, 8])):
        sizes: list[int] = []

        def note(saved: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(saved.numel() if saved.is_floating_point() and saved.shape[-1:] == (32,) else 0)
            return saved

        with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
            module(x, padding)
        kept.append(sum(sizes))
    assert kept[0] - kept[1] == 2 * MOE.top_k * 32  # one token's rows: the experts' inputs and results
