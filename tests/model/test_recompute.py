"""Recomputation changes memory and nothing else."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv3.model.attention import LatentAttention
from dsv3.model.transformer import Transformer
from dsv3.parallel.config import Recomputed
from dsv3.parallel.recompute import Recompute
from tests.reference import MODEL, tiny_model, tokens

DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, -1, -1, -1]])


def passes(model: Transformer) -> list[str]:
    """Filled with the name of each attention that runs, each time it runs."""
    ran: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, LatentAttention):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    return ran


def train(model: Transformer, documents: Tensor | None) -> list[Tensor]:
    """One pass forward and backward; logits, balance term and all gradients."""
    output = model(tokens(2, 9), documents)
    loss = output.logits.square().mean() + output.balance_loss
    for logits in output.mtp_logits:
        loss = loss + logits.square().mean()
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(list(model.parameters()))
    return [output.logits, *output.mtp_logits, output.balance_loss, *gradients]


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_full_recomputation_gives_the_same_bits_and_counts_the_load_once(documents: Tensor | None) -> None:
    config = replace(MODEL, mtp_depths=2)
    plain, recomputed = tiny_model(config), tiny_model(config)
    Recompute(Recomputed.full)(recomputed)
    ran = passes(recomputed)
    for mine, right in zip(train(recomputed, documents), train(plain, documents), strict=True):
        assert torch.equal(mine, right)
    for router, other in zip(recomputed.routers(), plain.routers(), strict=True):
        assert other.load.sum() == 2 * 9 * 3
        assert torch.equal(router.load, other.load)
    # Each layer ran twice, the MTP depths' too.
    names = [name for name, m in recomputed.named_modules() if isinstance(m, LatentAttention)]
    assert sorted(ran) == sorted(2 * names)
    assert len(names) == 4


def test_without_recomputation_each_layer_runs_once() -> None:
    model = tiny_model()
    Recompute(Recomputed.none)(model)
    ran = passes(model)
    train(model, None)
    assert len(ran) == len(set(ran)) == 3


def test_names_of_parameters_stay_as_they_are() -> None:
    model = tiny_model()
    before = list(model.state_dict())
    Recompute(Recomputed.full)(model)
    assert list(model.state_dict()) == before
