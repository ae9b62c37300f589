"""Held-out loss: one mean over all valid targets."""

import math
from collections.abc import Sequence

import pytest
import torch

from dsv3.data.mixture import HeldOutSources
from dsv3.data.packing import PADDING, PackedRow
from dsv3.model.moe import MoE
from dsv3.training.evaluation import evaluate
from dsv3.training.step import LocalForwardBackward
from tests.harness.trained import ALONE
from tests.reference import MOE, tiny_model
from tests.training.batches import ROWS, batch


class Held:
    """ROWS, or some of them, as the evaluation reads them."""

    sequence_length = 10

    def __init__(self, rows: Sequence[PackedRow] = ROWS) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> PackedRow:
        return self.rows[index]


def by_hand(rows: list[int]) -> tuple[float, int]:
    """Return the mean of -log p over the valid targets, and their number; each document is read alone."""
    model, total, count = tiny_model().eval(), 0.0, 0
    for number in rows:
        tokens, documents = ROWS[number]
        for document in set(documents.tolist()) - {-1}:
            ids = torch.from_numpy(tokens[documents == document])
            for i, scores in enumerate(model(ids[None]).logits[0, :-1].double().tolist()):
                total += math.log(sum(math.exp(s) for s in scores)) - scores[ids[i + 1]]
                count += 1
    return total / count, count


@pytest.mark.parametrize("microbatch", [1, 2, 3, 4, 6, 7])
def test_loss_is_the_mean_over_all_targets_whatever_the_microbatch_size(microbatch: int) -> None:
    found = evaluate(LocalForwardBackward(tiny_model(), True), Held(), microbatch, ALONE)
    loss, tokens = by_hand([0, 1, 2, 3, 4, 5])
    assert found.tokens == tokens == 41
    assert found.loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(("tokens", "rows"), [(39, [0, 2, 4]), (41, [0, 1, 3, 4]), (1, [0]), (999, range(6))])
def test_a_limit_in_tokens_takes_rows_from_all_over_whatever_the_microbatch_size(
    tokens: int, rows: Sequence[int]
) -> None:
    loss, scored = by_hand(list(rows))
    for microbatch in (1, 2, 4):
        found = evaluate(LocalForwardBackward(tiny_model(), True), Held(), microbatch, ALONE, tokens)
        assert found.tokens == scored
        assert found.loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("microbatch", [1, 4])  # 4: two rows that fill the last batch
def test_experts_compute_the_tokens_of_the_rows_and_no_row_that_fills_a_batch(microbatch: int) -> None:
    model, computed = tiny_model(), []
    for block in model.layers.values():
        if isinstance(block.ffn, MoE):
            block.ffn.experts.register_forward_pre_hook(lambda _, inputs: computed.append(len(inputs[0])))
    evaluate(LocalForwardBackward(model, True), Held(), microbatch, ALONE)
    tokens = sum(int((row.documents[:-1] != PADDING).sum()) for row in ROWS)
    assert sum(computed) == tokens * MOE.top_k < 6 * 10 * MOE.top_k


@pytest.mark.parametrize("microbatch", [1, 2, 4])
def test_the_sources_of_a_mixture_have_a_mean_each_and_the_whole_has_one(microbatch: int) -> None:
    mixture = HeldOutSources({"code": Held(ROWS[:1]), "web": Held(ROWS[1:])})
    forward_backward = LocalForwardBackward(tiny_model(), True)
    found = evaluate(forward_backward, mixture, microbatch, ALONE)
    for name, rows in (("code", [0]), ("web", [1, 2, 3, 4, 5])):
        loss, tokens = by_hand(rows)
        assert found.sources[name].tokens == tokens
        assert found.sources[name].loss == pytest.approx(loss, rel=1e-5)
    loss, tokens = by_hand(list(range(6)))
    assert found.tokens == tokens == sum(source.tokens for source in found.sources.values())
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert evaluate(forward_backward, Held(), microbatch, ALONE).sources == {}


def test_without_the_document_mask_documents_see_those_before_them() -> None:
    masked = evaluate(LocalForwardBackward(tiny_model(), True), Held(), 3, ALONE)
    open_ = evaluate(LocalForwardBackward(tiny_model(), False), Held(), 3, ALONE)
    assert open_.tokens == masked.tokens
    assert masked.loss is not None
    assert open_.loss is not None
    assert abs(open_.loss - masked.loss) > 1e-3


def test_rows_without_a_target_have_no_loss() -> None:
    mixture = HeldOutSources({"none": Held([PackedRow.empty(11)]), "some": Held(ROWS[:1])})
    found = evaluate(LocalForwardBackward(tiny_model(), True), mixture, 2, ALONE)
    assert found.sources["none"] == (None, 0, {})
    assert found.loss == found.sources["some"].loss
    alone = evaluate(LocalForwardBackward(tiny_model(), True), Held([PackedRow.empty(11)]), 2, ALONE)
    assert alone == (None, 0, {})


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_model_as_it_was(training: bool) -> None:
    model = tiny_model().train(training)
    output = model(batch(0).tokens)
    output.logits.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    loads = [router.load.clone() for router in model.routers()]
    evaluate(LocalForwardBackward(model, True), Held(), 2, ALONE)
    assert model.training == training
    assert all(module.training == training for module in model.modules())
    for name, parameter in model.named_parameters():
        if name in gradients:
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, gradients[name])
        else:
            assert parameter.grad is None
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    for router, load in zip(model.routers(), loads, strict=True):
        assert torch.equal(router.load, load)
