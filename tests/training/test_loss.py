"""Losses: sums over valid tokens divided once, whatever the microbatches."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.data.batch import Batch, collate
from dsv3.model.head import IGNORE_INDEX, LocalVocabularyShard, cross_entropy_sum, head_loss
from dsv3.model.transformer import ModelOutput
from dsv3.training.loss import (
    LossDenominators,
    LossSums,
    LossTerms,
    head_targets,
    loss_terms,
    valid_tokens,
)
from dsv3.training.schedule import StepHyperparameters
from tests.reference import normal
from tests.training.batches import ROWS, batch, row

VOCAB = 48
EYE = torch.eye(VOCAB)
"""The weight of a head whose logits are its hidden states."""
STEP = StepHyperparameters(0.1, mtp_weight=0.3, balance_weight=0.01, bias_speed=0.0, z_loss_weight=0.001)


def logits_of(rows: int, depths: int) -> list[Tensor]:
    """Random logits that need gradients: of the next token and of each depth."""
    return [normal(rows, 10, VOCAB, seed=n) for n in range(depths + 1)]


def terms(
    logits: list[Tensor], data: Batch, denominators: LossDenominators, balance: float = 1.0
) -> LossTerms:
    """The terms of a model with these logits, and with a z-loss of twice the balance term."""
    targets = head_targets(data, denominators, STEP, len(logits) - 1)
    scored = head_loss(logits, EYE, targets, LocalVocabularyShard())
    value = torch.tensor(balance)
    output = ModelOutput(None, [], scored, value, 2 * value, torch.zeros(2, dtype=torch.bool))
    return loss_terms(output, data, denominators)


def by_hand(logits: Tensor, ahead: int, rows: list[int]) -> tuple[float, int]:
    """Sum of -log p of the tokens `ahead` places on that lie in the same document; how many there are."""
    total, count = 0.0, 0
    for place, number in enumerate(rows):
        tokens, documents = ROWS[number]
        for i in range(10):
            j = i + ahead
            if j <= 10 and documents[i] >= 0 and documents[j] == documents[i]:
                scores = logits[place, i].double().tolist()
                total += math.log(sum(math.exp(s) for s in scores)) - scores[tokens[j]]
                count += 1
    return total, count


def whole_of(batch: Batch) -> LossDenominators:
    return LossDenominators(valid_tokens(batch), batch.tokens.shape[0])


def test_valid_tokens_are_those_with_a_successor_in_their_document() -> None:
    assert [int(valid_tokens(batch(n))) for n in range(6)] == [10, 9, 7, 1, 4, 10]
    assert int(valid_tokens(batch(0, 2, 3))) == 18


def test_cross_entropy_of_even_logits_is_the_logarithm_of_the_vocabulary() -> None:
    targets = torch.tensor([[3, IGNORE_INDEX, 0, 47]])
    even = torch.full((1, 4, VOCAB), 5.0)
    assert cross_entropy_sum(even, targets).item() == pytest.approx(3 * math.log(48), rel=1e-6)
    assert cross_entropy_sum(even, torch.full((1, 4), IGNORE_INDEX)).item() == 0


def test_cross_entropy_is_computed_in_fp32() -> None:
    logits, targets = 4 * normal(2, 10, VOCAB).detach().bfloat16(), batch(0, 1).targets
    found = cross_entropy_sum(logits, targets)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(cross_entropy_sum(logits.double(), targets).item(), rel=1e-5)


@pytest.mark.parametrize("depths", [1, 2, 3])
def test_losses_by_hand(depths: int) -> None:
    rows = [0, 1, 2, 4]
    logits, data = logits_of(4, depths), batch(*rows)
    found = terms(logits, data, whole_of(data))
    main, valid = by_hand(logits[0], 1, rows)
    assert valid == 30
    assert found.main.item() == pytest.approx(main / 30, rel=1e-5)
    # Each depth has fewer targets than the main loss and yet its denominator, eq. 24's 1/T.
    sums = [by_hand(each, depth + 1, rows) for depth, each in enumerate(logits[1:], start=1)]
    assert [count for _, count in sums] == [23, 17, 12][:depths]
    assert found.mtp.item() == pytest.approx(sum(s for s, _ in sums) / depths / 30, rel=1e-5)
    assert found.head.item() == pytest.approx(found.main.item() + 0.3 * found.mtp.item(), rel=1e-6)


def test_without_mtp_its_loss_is_zero() -> None:
    data = batch(0, 1)
    assert terms(logits_of(2, 0), data, whole_of(data)).mtp.item() == 0


def test_shares_of_the_microbatches_add_up_to_the_losses_of_the_batch() -> None:
    # Rows with 10, 9, 7, 1, 4 and 10 targets: a mean of means would weigh row 3's target tenfold.
    rows = [0, 1, 2, 3, 4, 5]
    logits, data = logits_of(6, 2), batch(*rows)
    whole = whole_of(data)
    once = terms(logits, data, whole, balance=(2 * 1.0 + 1 * 4.0 + 3 * 2.0) / 6)
    parts: list[LossTerms] = []
    for first, last, balance in ((0, 2, 1.0), (2, 3, 4.0), (3, 6, 2.0)):
        own = [each[first:last] for each in logits]
        parts.append(terms(own, batch(*rows[first:last]), whole, balance))
    for name in ("head", "main", "mtp", "balance"):
        total = torch.stack([getattr(p, name) for p in parts]).sum()
        assert total.item() == pytest.approx(getattr(once, name).item(), rel=1e-6)
    expected = torch.autograd.grad(once.head, logits)
    total = torch.stack([p.head for p in parts]).sum()
    for found, right in zip(torch.autograd.grad(total, logits), expected, strict=True):
        assert (found - right).abs().max() < 1e-6 * right.abs().max()


def test_balance_is_a_mean_over_the_sequences_of_the_whole_batch() -> None:
    data = batch(0, 1)
    found = terms(logits_of(2, 0), data, LossDenominators(torch.tensor(99), 12), balance=6.0)
    assert found.balance.item() == pytest.approx(1.0)
    assert found.z.item() == pytest.approx(2.0)


def test_padding_counts_in_no_denominator() -> None:
    # Rows with 10 tokens, 2 and none: the balance loss is a mean over two sequences, z over 12 tokens.
    data = collate([ROWS[0], ROWS[3], row(padding=11)])
    of_all = LossDenominators(torch.tensor(99), torch.tensor(8), torch.tensor(48))
    found = terms(logits_of(3, 0), data, of_all, balance=6.0)
    assert found.balance.item() == pytest.approx(6.0 * 2 / 8)
    assert found.z.item() == pytest.approx(12.0 * 12 / 48)


@pytest.mark.parametrize("sequences", [3, 7, 12, 15360, 10**6 + 3])
def test_counts_on_the_device_divide_full_rows_like_counts_of_the_host(sequences: int) -> None:
    data, logits, tokens = batch(0, 1), logits_of(2, 0), torch.tensor(99)
    on_host = LossDenominators(tokens, sequences)
    on_device = LossDenominators(tokens, torch.tensor(sequences), torch.tensor(10 * sequences))
    for balance in (6.0, 1.1, 3e-5):
        found, plain = (terms(logits, data, each, balance) for each in (on_device, on_host))
        assert torch.equal(found.balance, plain.balance)
        assert torch.equal(found.z, plain.z)
        assert found.balance.dtype == torch.float32


def test_main_loss_is_what_torch_calls_the_mean() -> None:
    logits, data = logits_of(3, 0), batch(0, 1, 3)
    expected = F.cross_entropy(logits[0].transpose(1, 2), data.targets, ignore_index=IGNORE_INDEX)
    assert terms(logits, data, whole_of(data)).main.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_total_weighs_each_term_and_a_stage_without_the_head_its_routers_alone() -> None:
    head, main, mtp, balance, z = (torch.tensor(value) for value in (2.9, 2.0, 3.0, 5.0, 7.0))
    found = LossTerms(head, main, mtp, balance, z)
    assert found.router_loss(STEP).item() == pytest.approx(0.05 + 0.007)
    assert found.total(STEP).item() == pytest.approx(2.9 + 0.05 + 0.007)
    data = batch(0, 1)
    output = ModelOutput(None, [], None, balance, z, torch.zeros(2, dtype=torch.bool))
    zero = torch.zeros(())
    without = loss_terms(output, data, whole_of(data))
    assert without == LossTerms(zero, zero, zero, balance, z)


def test_sums_come_back_from_one_tensor_as_they_were_and_add_up_by_field() -> None:
    one = LossSums.from_flat(torch.tensor([1.0, 2.0, 3.0, 0.0, 4.0]))
    assert [value.item() for value in one[:3]] == [1, 2, 3]
    assert one.nonfinite_routers.tolist() == [0, 4]
    both = LossSums.added_up([one, LossSums.from_flat(torch.tensor([10.0, 20.0, 30.0, 1.0, 0.0]))])
    assert both.flat().tolist() == [11, 22, 33, 1, 4]
    assert LossSums.zeros(2, torch.device("cpu")).flat().tolist() == [0] * 5
