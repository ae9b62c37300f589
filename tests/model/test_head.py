"""The head's loss in chunks: values and gradients against fp64 on whole logits, and how much lives."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dsv3.data.batch import Batch
from dsv3.model import head
from dsv3.model.generation import inference
from dsv3.model.head import (
    IGNORE_INDEX,
    HeadLoss,
    HeadTargets,
    LocalVocabularyShard,
    cross_entropy_sum,
    head_loss,
)
from dsv3.training.loss import LossDenominators
from dsv3.training.schedule import StepHyperparameters
from dsv3.training.step import LocalForwardBackward
from tests.harness.operators import Operators
from tests.reference import MODEL, normal, tiny_model

VOCAB, DIM = 60, 24
FACTORS = (0.5, 0.125, 2.0)


class Case:
    """Three predictions of 2 x 11 tokens, each with ignored targets: a row of them, and whole chunks of 4."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.hidden = [normal(2, 11, DIM, seed=n).detach().to(dtype).requires_grad_() for n in range(3)]
        self.weight = nn.Parameter(normal(VOCAB, DIM, seed=9).detach())
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, VOCAB, (3, 2, 11), generator=generator)
        ids[torch.rand(ids.shape, generator=generator) < 0.2] = IGNORE_INDEX
        ids[1, 0], ids[2, 0, :9] = IGNORE_INDEX, IGNORE_INDEX
        self.targets = HeadTargets(list(ids), FACTORS)

    def loss(self) -> HeadLoss:
        return head_loss(self.hidden, self.weight, self.targets, LocalVocabularyShard())

    def in_fp64(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Loss, cross-entropies, and gradients of hidden states and weight, by PyTorch on whole logits."""
        hidden = [x.detach().double().requires_grad_() for x in self.hidden]
        weight = self.weight.detach().to(self.hidden[0].dtype).double().requires_grad_()
        sums = torch.stack(
            [
                F.cross_entropy((x @ weight.t()).flatten(0, 1), ids.flatten(), reduction="sum")
                for x, ids in zip(hidden, self.targets.ids, strict=True)
            ]
        )
        loss = (sums * torch.tensor(FACTORS)).sum()
        return loss.detach(), sums.detach(), list(torch.autograd.grad(loss, [*hidden, weight]))


def relative(found: Tensor, right: Tensor) -> float:
    return float((found.detach().double() - right).norm() / right.norm())


@pytest.fixture(params=[1, 4, 22, 1000])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tokens of a chunk: one, a few (the last chunk is shorter), all of a prediction, more than there are."""
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * VOCAB * request.param)
    return int(request.param)


# bf16 rounds logits and their gradient to 2^-9; the sums over chunks are fp32.
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_loss_and_gradients_are_those_of_whole_logits(
    chunk: int, dtype: torch.dtype, rounding: float
) -> None:
    case = Case(dtype)
    loss, sums, gradients = case.in_fp64()
    found = case.loss()
    assert found.loss.dtype == found.cross_entropies.dtype == torch.float32
    assert relative(found.cross_entropies, sums) < rounding
    assert relative(found.loss, loss) < rounding
    # The gradient that arrives scales those that are ready.
    (-3 * found.loss).backward()
    for x, right in zip([*case.hidden, case.weight], gradients, strict=True):
        assert x.grad is not None
        assert x.grad.dtype == x.dtype
        assert relative(x.grad, -3 * right) < rounding


def test_positions_that_do_not_count_get_no_loss_and_no_gradient(chunk: int) -> None:
    case = Case()
    case.loss().loss.backward()
    for x, ids in zip(case.hidden, case.targets.ids, strict=True):
        assert x.grad is not None
        assert torch.equal(x.grad.any(-1), ids != IGNORE_INDEX)
    none = [torch.full_like(ids, IGNORE_INDEX) for ids in case.targets.ids]
    case.targets = HeadTargets(none, FACTORS)
    found = case.loss()
    assert [found.loss.item(), *found.cross_entropies.tolist()] == [0, 0, 0, 0]
    assert not any(x.any() for x in torch.autograd.grad(found.loss, [*case.hidden, case.weight]))


def test_a_nearly_certain_model_keeps_its_loss() -> None:
    """One of 129,280 logits is 20 above the rest. PyTorch's sum in fp32 on CPU loses part of what is left."""
    logits, targets = torch.zeros(1, 2, 129280), torch.tensor([[7, IGNORE_INDEX]])
    logits[..., 7] = 20.0
    right = F.cross_entropy(logits[0].double(), targets[0], reduction="sum").item()
    assert right == pytest.approx(2.66e-4, rel=0.01)
    assert cross_entropy_sum(logits, targets).item() == pytest.approx(right, abs=2e-6)  # 20 roundings of 1
    assert F.cross_entropy(logits[0], targets[0], reduction="sum").item() < 0.95 * right


def test_gradients_accumulate_and_the_first_becomes_grad_without_a_copy() -> None:
    case, handed = Case(), []
    known = head._known_gradient

    def keep(x: Tensor, gradient: Tensor) -> Tensor:
        handed.append(gradient.data_ptr())
        return known(x, gradient)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "_known_gradient", keep)
        case.loss().loss.backward()
    assert case.weight.grad is not None
    assert case.weight.grad.data_ptr() == handed[-1]
    once = case.weight.grad.clone()
    case.loss().loss.backward()
    assert torch.equal(case.weight.grad, 2 * once)


def test_what_is_frozen_or_only_read_costs_no_gradient() -> None:
    def matmuls(case: Case, records: bool = True) -> dict[str, int]:
        with Operators() as count, torch.set_grad_enabled(records):
            found = case.loss()
        trained = any(x.requires_grad for x in (*case.hidden, case.weight))
        assert found.loss.requires_grad == (records and trained)
        return {name: count.names[name] for name in ("mm", "addmm_")}

    case = Case()
    assert matmuls(case) == {"mm": 6, "addmm_": 3}
    assert matmuls(case, records=False) == {"mm": 3, "addmm_": 0}
    case.weight.requires_grad_(False)
    assert matmuls(case) == {"mm": 6, "addmm_": 0}
    case.loss().loss.backward()
    assert case.weight.grad is None
    assert case.hidden[0].grad is not None
    for x in case.hidden:
        x.requires_grad_(False)
    assert matmuls(case) == {"mm": 3, "addmm_": 0}


def test_inputs_and_weight_may_be_asked_for_apart_but_not_twice() -> None:
    """As pipelines with a split backward pass do."""
    case = Case()
    _, _, gradients = case.in_fp64()
    loss = case.loss().loss
    of_hidden = torch.autograd.grad(loss, case.hidden, retain_graph=True)
    (of_weight,) = torch.autograd.grad(loss, case.weight, retain_graph=True)
    for found, right in zip([*of_hidden, of_weight], gradients, strict=True):
        assert relative(found, right) < 1e-6
    with pytest.raises(RuntimeError, match="only once"):
        torch.autograd.grad(loss, case.weight)


def test_the_gradient_of_the_weight_is_there_before_those_of_the_hidden_states() -> None:
    """FSDP reduces the gradients of a module when those of its inputs arrive."""
    case, order = Case(), []
    for x in case.hidden:
        x.register_hook(lambda _: order.append("hidden"))
    case.weight.register_post_accumulate_grad_hook(lambda _: order.append("weight"))
    case.loss().loss.backward()
    assert order == ["weight", "hidden", "hidden", "hidden"]


class Largest(Operators):
    """The most elements that an operator has returned in one tensor."""

    elements = 0

    def saw(self, name: str, args: Any, result: Any) -> None:
        found = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.elements = max(self.elements, *found, 0)


def test_no_tensor_of_a_step_or_an_evaluation_has_the_logits_of_all_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a vocabulary beside which all else is small."""
    config = replace(MODEL, vocab_size=1000, mtp_depths=2)
    tokens, chunk = 4 * 64, 32
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * chunk * config.vocab_size)
    model = tiny_model(config)
    rows = torch.randint(0, 1000, (4, 64), generator=torch.Generator().manual_seed(0))
    data = Batch(rows, rows.roll(-1, -1), torch.zeros_like(rows))
    step = StepHyperparameters(lr=0.0, mtp_weight=0.3, balance_weight=1e-4, bias_speed=0.0)
    passes = LocalForwardBackward(model, document_mask=True)
    with Largest() as seen:
        passes.train([data], LossDenominators(torch.tensor(tokens), 4), step)
    # The weight and its gradient have as many elements as the logits of a chunk.
    assert seen.elements == chunk * config.vocab_size == model.head.weight.numel()
    with inference(model), Largest() as seen:
        passes.evaluate(data)
    assert seen.elements == chunk * config.vocab_size
    with inference(model), Largest() as seen:
        assert model(rows).logits.shape == (4, 64, 1000)
    assert seen.elements == tokens * config.vocab_size
