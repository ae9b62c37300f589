"""The optimizer's parameter groups and gradient clipping."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsv3.config.optimizer import AdamWConfig
from dsv3.training import sharded_optimizers
from dsv3.training.expert_bias import update_expert_bias
from dsv3.training.optimizer import build_optimizer, clip_gradients, freeze, set_learning_rate
from tests.harness.trained import ALONE
from tests.reference import tiny_model, tokens


def test_adamw_gets_the_numbers_of_its_config() -> None:
    config = AdamWConfig(lr=0.02, betas=(0.8, 0.7), eps=1e-3, weight_decay=0.3, fused=False)
    optimizer = build_optimizer(config, [tiny_model()])
    assert type(optimizer) is torch.optim.AdamW
    for group, decay in zip(optimizer.param_groups, (0.3, 0.0), strict=True):
        assert (group["lr"], tuple(group["betas"]), group["eps"]) == (0.02, (0.8, 0.7), 1e-3)
        assert group["weight_decay"] == decay
        assert not group["fused"]


def test_every_parameter_is_in_one_group() -> None:
    model = tiny_model()
    groups = build_optimizer(AdamWConfig(), [model]).param_groups
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters())


def test_weight_decay_shrinks_matrices_and_spares_norms() -> None:
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    build_optimizer(AdamWConfig(lr=0.1, weight_decay=0.5), [model]).step()
    for name, parameter in model.named_parameters():
        expected = before[name] if "norm" in name else 0.95 * before[name]
        assert torch.allclose(parameter, expected, rtol=1e-6)


def test_the_learning_rate_reaches_every_group() -> None:
    optimizer = build_optimizer(AdamWConfig(), [tiny_model()])
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125] * 2


@pytest.mark.parametrize("share", [0.25, 4.0])
def test_gradients_are_scaled_together_and_only_down(share: float) -> None:
    model = tiny_model()
    output = model(tokens(2, 9))
    (output.logits.square().sum() + output.mtp_logits[0].square().sum()).backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    norm = sum(float(g.double().square().sum()) for g in gradients) ** 0.5
    assert clip_gradients([model], share * norm, ALONE).item() == pytest.approx(norm, rel=1e-5)
    for parameter, before in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, min(share, 1.0) * before, rtol=1e-4)


def test_parameters_without_a_gradient_do_not_disturb_the_clipping() -> None:
    model = tiny_model()
    model.norm.weight.grad = torch.full((32,), 2.0)
    model.head.weight.grad = torch.zeros(48, 32)
    assert clip_gradients([model], 1.0, ALONE).item() == pytest.approx(128**0.5)
    assert model.norm.weight.grad.norm().item() == pytest.approx(1.0, rel=1e-5)


def test_a_factor_of_the_learning_rate_stays_when_the_schedule_sets_it() -> None:
    model = tiny_model()
    config = AdamWConfig(lr=0.5, lr_scale={"embedding.*": 0.1, "*": 0.5}, no_decay=["embedding.*"])
    optimizer = build_optimizer(config, [model])
    rates = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(model.embedding.weight)]["lr"] == pytest.approx(0.025)
    set_learning_rate(optimizer, 2.0)
    embedding, norm = rates[id(model.embedding.weight)], rates[id(model.norm.weight)]
    assert (embedding["lr"], embedding["weight_decay"]) == (pytest.approx(0.1), 0.0)
    assert (norm["lr"], norm["weight_decay"]) == (1.0, 0.1)


def test_what_is_frozen_has_no_gradient_and_its_expert_bias_stays() -> None:
    model = tiny_model()
    freeze(model, ["layers.1.ffn.router.weight", "embedding.*"])
    output = model(tokens(2, 9))
    (output.logits.square().sum() + output.mtp_logits[0].square().sum()).backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {"layers.1.ffn.router.weight", "embedding.weight"}
    optimizer = build_optimizer(AdamWConfig(), [model])
    assert len({id(p) for group in optimizer.param_groups for p in group["params"]}) == (
        len(list(model.parameters())) - 2
    )
    clip_gradients([model], 1.0, ALONE)
    optimizer.step()
    moves = {
        name: router.bias_moves for name, router in zip(model.moe_layers(), model.routers(), strict=True)
    }
    assert [name for name, moving in moves.items() if not moving] == ["layers.1"]
    routers = dict(enumerate(model.routers()))
    before = [
        router.selection_bias.clone() for router in routers.values() if router.selection_bias is not None
    ]
    load = torch.arange(float(len(routers) * model.config.moe.num_experts)).view(len(routers), -1)
    update_expert_bias(routers, load, 0.5)
    changed = [
        not torch.equal(router.selection_bias, old)
        for router, old in zip(routers.values(), before, strict=True)
        if router.selection_bias is not None
    ]
    assert changed == list(moves.values())


def test_a_rank_whose_layers_are_all_frozen_clips_and_steps_nothing() -> None:
    model = tiny_model()
    freeze(model, ["*"])
    optimizer = build_optimizer(AdamWConfig(frozen=["*"]), [model])
    assert clip_gradients([model], 1.0, ALONE) == 0.0
    optimizer.step()
    assert not optimizer.state


def test_sums_of_offloaded_shards_are_exchanged_on_the_meshs_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of NCCL takes no tensor of the host."""

    class Sum:
        device = "host"

        def contiguous(self) -> "Sum":
            return self

        def to(self, device: str) -> "Sum":
            seen.append(device)
            return self

    seen: list[str] = []
    mesh = SimpleNamespace(size=lambda axis: 2, get_group=lambda axis: None, device_type="cuda")
    monkeypatch.setattr(sharded_optimizers, "_sharded_axes", lambda *_: [(mesh, 0)])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: seen.append("all-reduce"))
    part: Any = Sum()
    sharded_optimizers._sum(part, part, [0])
    assert seen == ["cuda", "all-reduce", "host"]
