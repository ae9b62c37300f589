"""One optimizer step: microbatches add up, metrics are right, biases move after the update."""

import math
from collections.abc import Sequence
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from dsv3.checkpoint.run_statistics import RunStatistics
from dsv3.config.accidents import AccidentsConfig
from dsv3.config.model import ModelConfig
from dsv3.config.optimizer import AdamWConfig
from dsv3.config.parallel import RecomputeMode
from dsv3.config.precision import FP8Engine, Granularity
from dsv3.config.training import BIAS_SPEED, BalanceConfig, TrainConfig
from dsv3.data.batch import Batch, collate
from dsv3.data.packing import PADDING, PackedRow
from dsv3.fp8.convert_model import BlockFP8
from dsv3.metrics.row import MetricsRow
from dsv3.model import transformer
from dsv3.model.generation import inference
from dsv3.model.head import IGNORE_INDEX
from dsv3.model.transformer import Transformer
from dsv3.parallel.activation_checkpoint import ActivationCheckpointing
from dsv3.training.optimizer import build_optimizer
from dsv3.training.schedule import StepHyperparameters
from dsv3.training.step import LocalForwardBackward, TrainStep
from dsv3.training.step_guard import GOOD, NONFINITE, StepGuard
from tests import reference
from tests.harness.trained import ALONE
from tests.reference import MODEL, SOFTMAX_MOE, tiny_model
from tests.training.batches import batch, row

FIRST_NONFINITE_ROUTER = "first_nonfinite_router"
# So large that a move is the gradient and not the rounding of the parameter it is added to.
LR = 100.0
WEIGHTS = StepHyperparameters(lr=LR, mtp_weight=0.3, balance_weight=0.05, bias_speed=0.01)


def step_of(model: Transformer, clip_norm: float = 1e9, document_mask: bool = True) -> TrainStep:
    # SGD: AdamW's division would turn rounding into updates of the size of lr.
    optimizer = torch.optim.SGD(model.parameters(), lr=99.0)
    return TrainStep(LocalForwardBackward(model, document_mask), optimizer, ALONE, clip_norm)


def trained(
    microbatches: Sequence[Batch], weights: StepHyperparameters = WEIGHTS, clip_norm: float = 1e9
) -> tuple[Transformer, dict[str, Tensor]]:
    """A model after one step, and the step's metrics."""
    model = tiny_model()
    return model, step_of(model, clip_norm)(list(microbatches), weights).known()


def moves(model: Transformer) -> dict[str, Tensor]:
    """How far each parameter has come from where it started."""
    start = dict(tiny_model().named_parameters())
    return {name: (p - start[name]).detach() for name, p in model.named_parameters()}


def expected_terms(data: Batch) -> tuple[Transformer, Tensor, Tensor, Tensor, list[Tensor]]:
    """Main, MTP and balance term of a batch by the reference model, and its loads."""
    model = tiny_model()
    logits, predicted, balance, loads = reference.transformer(model, data.tokens, data.documents)
    main, mtp = torch.zeros(()), torch.zeros(())
    valid = 0
    for b in range(len(data.tokens)):
        for i, target in enumerate(data.targets[b].tolist()):
            if target != IGNORE_INDEX:
                valid += 1
                main = main - logits[b, i].log_softmax(-1)[target]
            # Depth 1 predicts position i + 1's target, if i + 1 is in the document and has one.
            inside = i + 1 < data.targets.shape[1] and data.documents[b, i] == data.documents[b, i + 1]
            if inside and data.targets[b, i + 1] != IGNORE_INDEX:
                mtp = mtp - predicted[0][b, i].log_softmax(-1)[data.targets[b, i + 1]]
    return model, main / valid, mtp / valid, balance, loads


def test_a_step_follows_the_gradient_of_the_weighted_sum_of_the_losses() -> None:
    data = batch(1, 2)
    model, main, mtp, balance, _ = expected_terms(data)
    weights = replace(WEIGHTS, balance_weight=3.0)
    gradients = torch.autograd.grad(main + 0.3 * mtp + 3.0 * balance, list(model.parameters()))
    found, metrics = trained([data], weights)
    for move, gradient in zip(moves(found).values(), gradients, strict=True):
        assert gradient.any()
        reference.assert_close(move, -LR * gradient, 1e-4)
    norm = torch.stack([g.norm() for g in gradients]).norm()
    assert metrics["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-4)
    assert metrics["loss"].item() == pytest.approx(main.item(), rel=1e-5)
    assert metrics["mtp_loss"].item() == pytest.approx(mtp.item(), rel=1e-5)
    assert metrics["balance_loss"].item() == pytest.approx(3.0 * balance.item(), rel=1e-5)


def test_microbatches_with_different_numbers_of_targets_equal_one_large_batch() -> None:
    # 19, 8 and 14 valid targets.
    whole, metrics = trained([batch(0, 1, 2, 3, 4, 5)])
    split, parts = trained([batch(0, 1), batch(2, 3), batch(4, 5)])
    for name, move in moves(whole).items():
        assert move.any()
        reference.assert_close(moves(split)[name], move)
    assert set(parts) == set(metrics)
    for name, value in metrics.items():
        assert parts[name].item() == pytest.approx(value.item(), rel=1e-5), name
    for mine, right in zip(split.routers(), whole.routers(), strict=True):
        assert mine.selection_bias is not None
        assert right.selection_bias is not None
        assert torch.equal(mine.selection_bias, right.selection_bias)


def test_a_batch_twice_is_the_batch_once() -> None:
    once, twice = trained([batch(1, 2)])[0], trained([batch(1, 2), batch(1, 2)])[0]
    for name, move in moves(once).items():
        reference.assert_close(moves(twice)[name], move)


def test_biases_move_by_the_load_of_all_microbatches_after_the_step() -> None:
    _, _, _, _, first = expected_terms(batch(1, 2))
    _, _, _, _, second = expected_terms(batch(0, 5))
    before = [router.selection_bias for router in tiny_model().routers()]
    model, metrics = trained([batch(1, 2), batch(0, 5)])
    assert len(first) == len(model.routers()) == 2  # the MTP depth's too
    violations = []
    for router, bias, a, b in zip(model.routers(), before, first, second, strict=True):
        load = a + b
        assert router.selection_bias is not None
        assert bias is not None
        assert torch.allclose(router.selection_bias, bias + 0.01 * (load.mean() - load).sign())
        assert not router.load.any()
        violations.append((load.max() / load.mean() - 1).item())
    assert metrics["moe_max_violation"].item() == pytest.approx(max(violations))


def test_bias_speed_zero_leaves_the_biases_and_still_clears_the_counters() -> None:
    model, _ = trained([batch(0, 1)], replace(WEIGHTS, bias_speed=0.0))
    for router, before in zip(model.routers(), tiny_model().routers(), strict=True):
        assert router.selection_bias is not None
        assert before.selection_bias is not None
        assert torch.equal(router.selection_bias, before.selection_bias)
        assert not router.load.any()


def test_clipping_shortens_the_step_and_the_norm_told_is_that_before() -> None:
    free, metrics = trained([batch(0, 1)])
    norm = metrics["grad_norm"].item()
    clipped, clipped_metrics = trained([batch(0, 1)], clip_norm=norm / 8)
    assert clipped_metrics["grad_norm"].item() == pytest.approx(norm)
    for name, move in moves(free).items():
        reference.assert_close(8 * moves(clipped)[name], move, 1e-4)


def test_two_steps_do_not_share_gradients() -> None:
    model = tiny_model()
    step = step_of(model)
    step([batch(0, 1)], replace(WEIGHTS, lr=0.0, bias_speed=0.0))
    assert all(p.grad is None for p in model.parameters())
    step([batch(2, 5)], WEIGHTS)
    alone, _ = trained([batch(2, 5)])
    for mine, right in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(mine, right)


def test_the_document_mask_keeps_documents_apart() -> None:
    data = batch(1, 2)
    masked = step_of(tiny_model())([data], WEIGHTS).loss
    open_ = step_of(tiny_model(), document_mask=False)([data], WEIGHTS).loss
    _, expected, _, _, _ = expected_terms(data)
    assert masked.item() == pytest.approx(expected.item(), rel=1e-5)
    assert abs(masked.item() - open_.item()) > 1e-3


def test_a_step_trains_a_model_that_was_evaluating() -> None:
    model = tiny_model().eval()
    assert step_of(model)([batch(0)], WEIGHTS).mtp_loss is not None
    assert model.training


def cut(data: Batch) -> list[Batch]:
    """The rows of a batch one by one, at the lengths of their tokens."""
    lengths = (data.documents != PADDING).sum(1).tolist()
    fields = (data.tokens, data.targets, data.documents)
    return [Batch(*(x[b : b + 1, :n].clone() for x in fields)) for b, n in enumerate(lengths) if n]


PADDED = [
    collate([row(3, 8, seed=2), row(padding=11)]),
    collate([row(2, padding=9, seed=4), row(1, 5, padding=5, seed=5), row(10, padding=1, seed=3)]),
    collate([row(1, padding=10, seed=7)]),
    collate([row(padding=11)]),
    collate([row(11, seed=6)]),
]
"""Microbatches of rows with padding, one of padding alone, and one without any."""


@pytest.mark.parametrize(
    ("document_mask", "mode"),
    [(True, RecomputeMode.none), (False, RecomputeMode.none), (True, RecomputeMode.full)],
)
def test_padded_rows_train_as_the_rows_cut_to_their_tokens_do(
    document_mask: bool, mode: RecomputeMode
) -> None:
    config, weights = replace(MODEL, mtp_depths=2), replace(WEIGHTS, balance_weight=3.0, z_loss_weight=0.5)
    found = []
    for microbatches in (PADDED, [one for data in PADDED for one in cut(data)]):
        model = tiny_model(config)
        loads: list[Tensor] = []
        ActivationCheckpointing(mode)(model)
        step = step_of(model, document_mask=document_mask)
        step.optimizer.register_step_pre_hook(
            lambda *_, model=model, loads=loads: loads.extend(
                router.load.clone() for router in model.routers()
            )
        )
        metrics = step(microbatches, weights).known()
        found.append((metrics, loads, dict(model.named_parameters()), model.routers()))
    (mine, my_loads, moved, routers), (right, loads, expected, others) = found
    # 39 tokens, beside which the rows have 41 positions of padding.
    assert {int(load.sum()) for load in my_loads} == {39 * MODEL.moe.top_k}
    assert mine.pop("padding").item() == pytest.approx(41 / 80)
    assert right.pop("padding").item() == 0
    assert all(map(torch.equal, my_loads, loads))
    assert {name: pytest.approx(value.item(), rel=1e-5) for name, value in mine.items()} == {
        name: value.item() for name, value in right.items()
    }
    start = dict(tiny_model(config).named_parameters())
    for name, parameter in expected.items():
        reference.assert_close(moved[name] - start[name], parameter - start[name], 2e-5)
    for router, other in zip(routers, others, strict=True):
        assert router.selection_bias is not None
        assert other.selection_bias is not None
        assert torch.equal(router.selection_bias, other.selection_bias)


def test_in_fp8_padding_changes_no_forward_pass_and_gradients_by_the_scales_that_it_shares() -> None:
    results = []
    for microbatches in (PADDED[1:2], cut(PADDED[1])):
        model = tiny_model()
        BlockFP8(Granularity.tile, False, FP8Engine.emulated)(model, torch.device("cpu"))
        results.append((step_of(model)(microbatches, WEIGHTS), moves(model)))
    (mine, found), (right, expected) = results
    assert mine.loss.item() == pytest.approx(right.loss.item(), rel=1e-5)
    assert mine.moe_max_violation == right.moe_max_violation
    for name, move in expected.items():
        assert (found[name] - move).norm() < 0.06 * move.norm(), name


def test_full_rows_bring_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(transformer, "padding_mask", refuse)
    trained([batch(0, 1), batch(2, 5)])
    with pytest.raises(AssertionError):
        trained([batch(0, 1), batch(2, 3)])


def test_a_batch_without_targets_leaves_finite_weights() -> None:
    empty = batch(0)
    empty = replace(empty, targets=torch.full_like(empty.targets, IGNORE_INDEX))
    model, metrics = trained([empty])
    assert (metrics["loss"].item(), metrics["targets"].item()) == (0, 0)
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_step_of_padding_alone_is_all_padding_and_its_norm_raises_no_alarm() -> None:
    nothing = collate([PackedRow.empty(9)] * 2)
    step = step_of(tiny_model())
    step.guard = StepGuard(AccidentsConfig(spike_window=2), RunStatistics(), ALONE.device, step.optimizer)
    weights = replace(WEIGHTS, lr=0.01)
    norm = step([batch(0)], weights).grad_norm.item()
    empty = [step([nothing], weights) for _ in range(4)]
    told = [[float(m.known()[name]) for name in ("padding", "targets", "accident")] for m in empty]
    assert told == [[1, 0, GOOD]] * 4
    assert step.guard.good_norms() == [norm]
    assert step([batch(1)], weights).accident == GOOD


@pytest.mark.parametrize(
    ("config", "unknown"),
    [
        (MODEL, set()),
        (replace(MODEL, mtp_depths=0), {"mtp_loss"}),
        (replace(MODEL, moe=SOFTMAX_MOE), {"moe_bias_range"}),
        (
            replace(MODEL, num_dense_layers=2, mtp_depths=0),
            {"mtp_loss", "balance_loss", "moe_max_violation", "moe_entropy", "moe_bias_range"},
        ),
    ],
)
def test_figures_are_those_of_the_metrics_row_that_the_model_has(
    config: ModelConfig, unknown: set[str]
) -> None:
    known = {"loss", "mtp_loss", "balance_loss", "grad_norm"}
    known |= {"moe_max_violation", "moe_entropy", "moe_bias_range", "padding"}
    assert known <= {f.name for f in fields(MetricsRow)}
    metrics = step_of(tiny_model(config))([batch(0, 1)], WEIGHTS).known()
    assert metrics.pop("targets") > 0
    broken = metrics.pop(FIRST_NONFINITE_ROUTER, None)
    assert (broken is None) == ("balance_loss" in unknown)
    assert set(metrics) == known - unknown
    assert all(value.ndim == 0 and value.isfinite() for value in metrics.values())


def test_weights_switch_where_the_report_says() -> None:
    # A step is 0.1T tokens of 14.8T.
    train = TrainConfig(balance=BalanceConfig(bias_speed=BIAS_SPEED))
    weights = {step: StepHyperparameters.at(step / 148, 0.5, train) for step in range(1, 149)}
    assert {step for step, w in weights.items() if w.mtp_weight == 0.3} == set(range(1, 101))
    assert {step for step, w in weights.items() if w.mtp_weight == 0.1} == set(range(101, 149))
    assert {step for step, w in weights.items() if w.bias_speed == BIAS_SPEED == 0.001} == set(range(1, 144))
    assert {step for step, w in weights.items() if w.bias_speed == 0.0} == set(range(144, 149))
    assert {(w.lr, w.balance_weight) for w in weights.values()} == {(0.5, 0.0001)}


def test_a_tiny_model_learns_a_repeated_batch_by_heart() -> None:
    model = tiny_model(replace(MODEL, norm_eps=1e-6, latent_norm_eps=1e-6))
    step = TrainStep(LocalForwardBackward(model, True), build_optimizer(AdamWConfig(), [model]), ALONE, 1.0)
    data = batch(0, 1, 2, 5)
    for _ in range(60):
        metrics = step([data], replace(WEIGHTS, lr=0.01)).known()
    assert metrics["loss"] < 0.1 * math.log(MODEL.vocab_size)
    assert metrics["mtp_loss"] < 0.1 * math.log(MODEL.vocab_size)


def test_the_first_router_that_met_no_number_is_told() -> None:
    model = tiny_model(replace(MODEL, num_layers=4, mtp_depths=0))
    assert step_of(model)([batch(0)], WEIGHTS).known()[FIRST_NONFINITE_ROUTER] == -1
    with torch.no_grad():
        model.get_parameter("layers.2.attention.o_proj.weight")[0, 0] = torch.nan
    names = model.moe_layers()
    metrics = step_of(model)([batch(0), batch(1)], WEIGHTS).known()
    assert names[int(metrics[FIRST_NONFINITE_ROUTER])] == "layers.2"
    assert names == ["layers.1", "layers.2", "layers.3"]


@pytest.mark.parametrize("weight", [0.0, 10.0])
def test_the_z_loss_pulls_router_logits_towards_zero_where_it_has_a_weight(weight: float) -> None:
    def z(model: Transformer) -> float:
        for router in model.routers():
            router.z_loss = True
        with inference(model):
            return float(model(batch(0, 1).tokens).z_loss)

    model, other = tiny_model(), tiny_model()
    step_of(other)([batch(0, 1)], replace(WEIGHTS, lr=1e-4, bias_speed=0.0))
    step_of(model)([batch(0, 1)], replace(WEIGHTS, lr=1e-4, bias_speed=0.0, z_loss_weight=weight))
    assert (z(model) < z(other)) == (weight > 0)


def test_broken_tiles_are_a_figure_of_a_step_in_fp8_and_only_of_the_step_that_had_them() -> None:
    model = tiny_model()
    BlockFP8(Granularity.tile, False, FP8Engine.auto)(model, torch.device("cpu"))
    step = step_of(model)
    still = replace(WEIGHTS, lr=0.0, bias_speed=0.0)
    sound = step([batch(0, 1)], still)
    assert sound.known()["fp8_broken_tiles"].item() == 0
    assert sound.known()["grad_norm"].isfinite()
    weight = dict(model.named_parameters())["layers.0.attention.o_proj.weight"]
    before = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] = math.inf
    broken = step([batch(0, 1)], still)
    assert broken.known()["fp8_broken_tiles"].item() > 0
    assert not broken.known()["grad_norm"].isfinite()
    model.load_state_dict(tiny_model().state_dict())
    assert weight[0, 0].item() == before
    assert step([batch(0, 1)], still).known()["fp8_broken_tiles"].item() == 0


@pytest.mark.parametrize(("tiles", "verdict"), [(0.0, GOOD), (2.0, NONFINITE), (math.nan, GOOD)])
def test_broken_tiles_alone_make_a_step_a_bad_one_where_their_number_is_known(
    monkeypatch: pytest.MonkeyPatch, tiles: float, verdict: int
) -> None:
    monkeypatch.setattr("dsv3.training.step.take_nonfinite_tiles", lambda *_: torch.tensor(tiles))
    model = tiny_model()
    step = step_of(model)
    step.in_fp8, step.guard = (
        True,
        StepGuard(AccidentsConfig(), RunStatistics(), ALONE.device, step.optimizer),
    )
    metrics = step([batch(0, 1)], WEIGHTS)
    assert metrics.accident is not None
    assert int(metrics.accident) == verdict
    moved = any(bool(move.any()) for move in moves(model).values())
    assert moved is (verdict == GOOD)
