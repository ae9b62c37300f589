"""The whole model against a second, plain one; what each position may know; documents in one row."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv3.config.model import ModelConfig
from dsv3.data.batch import mtp_targets
from dsv3.data.packing import PADDING
from dsv3.model.head import IGNORE_INDEX
from dsv3.model.transformer import Transformer
from tests import reference
from tests.reference import (
    ATTENTION,
    MODEL,
    SOFTMAX_MOE,
    YARN,
    assert_close,
    assert_same_gradients,
    tiny_model,
    tokens,
)

CONFIGS = {
    "v3": MODEL,
    "v2": replace(MODEL, attention=replace(ATTENTION, q_lora_rank=None), moe=SOFTMAX_MOE, mtp_depths=0),
    "yarn and two depths": replace(MODEL, rope=YARN, mtp_depths=2),
    "dense": replace(MODEL, num_dense_layers=2, mtp_depths=0),
    "no dense layer": replace(MODEL, num_dense_layers=0),
}
DEEP = replace(MODEL, mtp_depths=3)
PACKED = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, -1, -1], [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]])


def changed(before: Tensor, after: Tensor) -> list[int]:
    """The positions of the first row whose logits differ by more than rounding."""
    difference = (after - before).abs().amax(-1)[0]
    return [n for n, value in enumerate(difference.tolist()) if value > 1e-4]


def with_token(ids: Tensor, place: int) -> Tensor:
    """The same tokens but for one place."""
    ids = ids.clone()
    ids[:, place] = (ids[:, place] + 1) % MODEL.vocab_size
    return ids


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_model_equals_the_reference(name: str, packed: bool) -> None:
    model, ids = tiny_model(CONFIGS[name]), tokens(2, 7)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, -1, -1]]) if packed else None
    found = model(ids, documents)
    logits, predicted, balance, loads = reference.transformer(model, ids, documents)
    assert_close(found.logits, logits)
    assert len(found.mtp_logits) == len(predicted) == CONFIGS[name].mtp_depths
    for mine, right in zip(found.mtp_logits, predicted, strict=True):
        assert_close(mine, right)
    assert_close(found.balance_loss, balance)
    assert [router.load.tolist() for router in model.routers()] == [load.tolist() for load in loads]
    everything = torch.cat([found.logits.flatten(), *(p.flatten() for p in found.mtp_logits)])
    expected = torch.cat([logits.flatten(), *(p.flatten() for p in predicted)])
    assert_same_gradients(everything, expected, list(model.parameters()), 1e-4)
    if model.routers():
        weights = [router.weight for router in model.routers()]
        assert_same_gradients(found.balance_loss, balance, [model.embedding.weight, *weights], 1e-4)


def test_evaluation_gives_the_same_logits_and_no_predictions_further_ahead() -> None:
    model, ids = tiny_model(DEEP), tokens(2, 9)
    training = model.train()(ids)
    evaluation = model.eval()(ids)
    assert (len(training.mtp_logits), len(evaluation.mtp_logits)) == (3, 0)
    assert torch.equal(training.logits, evaluation.logits)


def test_logits_are_fp32_in_every_compute_dtype() -> None:
    output = tiny_model(dtype=torch.bfloat16)(tokens(2, 9))
    exact = tiny_model()(tokens(2, 9))
    for found, right in ((output.logits, exact.logits), (output.mtp_logits[0], exact.mtp_logits[0])):
        assert found.dtype == right.dtype == torch.float32
        # bf16 activations show, and no more than they should. A token may go to other experts.
        error = ((found - right).norm(dim=-1) / right.norm(dim=-1)).median()
        assert 1e-4 < error < 0.05


@pytest.mark.parametrize("config", [DEEP, replace(MODEL, rope=YARN)])
def test_no_position_sees_the_tokens_after_it(config: ModelConfig) -> None:
    model, ids = tiny_model(config).eval(), tokens(1, 9)
    before = model(ids).logits
    for place in range(9):
        after = model(with_token(ids, place)).logits
        assert changed(before, after) == list(range(place, 9))


def test_depth_k_of_mtp_sees_k_tokens_further_and_no_more() -> None:
    model, ids = tiny_model(DEEP), tokens(1, 9)
    before = model(ids).mtp_logits
    for place in range(3, 9):
        after = model(with_token(ids, place)).mtp_logits
        for depth in (1, 2, 3):
            assert changed(before[depth - 1], after[depth - 1]) == list(range(place - depth, 9))


def test_a_document_gives_the_same_logits_alone_and_in_a_packed_row() -> None:
    model, ids = tiny_model(replace(DEEP, rope=YARN)), tokens(2, 11)
    packed = model(ids, PACKED)
    for row, start, end in ((0, 0, 5), (0, 5, 9), (1, 0, 3), (1, 3, 11)):
        alone = model(ids[row : row + 1, start:end])
        assert_close(packed.logits[row : row + 1, start:end], alone.logits, 1e-4)
        for depth in range(1, 4):
            # The last `depth` places have no token to join with, and no target either.
            end_of_depth = max(end - depth, start)
            found = packed.mtp_logits[depth - 1][row, start:end_of_depth]
            right = alone.mtp_logits[depth - 1][0, : end_of_depth - start]
            assert torch.allclose(found, right, atol=1e-4)
    # Without the mask the second document looks back.
    assert changed(packed.logits[:, :9], model(ids).logits[:, :9]) == [5, 6, 7, 8]


def test_no_valid_target_depends_on_another_document() -> None:
    model, ids = tiny_model(DEEP), tokens(2, 11)
    ends = (PACKED.roll(-1, -1) != PACKED) | (PACKED == PADDING)
    targets = ids.roll(-1, -1).masked_fill(ends, IGNORE_INDEX)
    before = model(ids, PACKED)
    for place in range(11):
        after = model(with_token(ids, place), PACKED)
        same_document = PACKED[:, place : place + 1] == PACKED
        outputs = zip([before.logits, *before.mtp_logits], [after.logits, *after.mtp_logits], strict=True)
        for depth, (old, new) in enumerate(outputs):
            valid = mtp_targets(targets, PACKED, depth) != IGNORE_INDEX
            moved = (old - new).abs().amax(-1) > 1e-4
            assert not (moved & valid & ~same_document).any()


def test_embedding_and_head_are_shared_with_the_mtp_depths() -> None:
    model = tiny_model(DEEP)
    wide = [name for name, p in model.named_parameters() if MODEL.vocab_size in p.shape]
    assert wide == ["embedding.weight", "head.weight"]
    ids = tokens(1, 9)
    for logits in model(ids).mtp_logits:
        model.zero_grad()
        logits[0, 0].sum().backward(retain_graph=True)
        for weight in (model.embedding.weight, model.head.weight):
            assert weight.grad is not None
            assert weight.grad.any()


def test_routers_are_those_of_every_moe_layer_with_the_mtp_depths_last() -> None:
    model = tiny_model(replace(DEEP, num_layers=3))
    names = {id(module): name for name, module in model.named_modules()}
    assert [names[id(router)] for router in model.routers()] == [
        "layers.1.ffn.router",
        "layers.2.ffn.router",
        *[f"mtp.{n}.block.ffn.router" for n in range(3)],
    ]
    assert len(model.routers()) == model.config.num_moe_layers


def test_loads_add_up_over_training_passes_only() -> None:
    model, first, second = tiny_model(), tokens(2, 9), tokens(2, 9, seed=7)

    def loads(model: Transformer) -> Tensor:
        return torch.stack([router.load for router in model.routers()])

    one, other = tiny_model(), tiny_model()
    one(first), other(second)
    model(first), model(second)
    assert torch.equal(loads(model), loads(one) + loads(other))
    assert loads(model).sum(-1).tolist() == [2 * 2 * 9 * 3] * 2
    before = loads(model)
    model.eval()(first)
    with torch.no_grad():
        model(second)
    assert torch.equal(loads(model), before)
