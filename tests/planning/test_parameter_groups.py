"""Patterns of names choose weight decay, learning rate and what is frozen, which the plan leaves out."""

from dataclasses import replace

import pytest

from dsv3.config.model import ModelConfig
from dsv3.config.optimizer import AdamWConfig, MuonConfig
from dsv3.config.parallel import ParallelConfig
from dsv3.planning.layout import ParallelDims
from dsv3.planning.parameter_groups import is_frozen, parameter_groups
from dsv3.planning.parameters import every_weight
from dsv3.planning.plan import make_plan
from dsv3.planning.report import format_plan
from tests.planning.plans import H800, config_of
from tests.planning.presets import NAMES, preset


@pytest.mark.parametrize("name", NAMES)
def test_by_default_what_has_one_dimension_does_not_decay_and_nothing_else(name: str) -> None:
    config = preset(name)
    groups = parameter_groups(AdamWConfig(), config)
    for weight in every_weight(config):
        assert groups[weight.name].decays == (len(weight.shape) > 1), weight.name
        assert groups[weight.name].lr_scale == 1.0


def test_factors_of_all_patterns_that_match_are_multiplied() -> None:
    scale = {"layers.*": 0.5, "*.attention.*": 0.5, "layers.1.*": 3.0}
    groups = parameter_groups(AdamWConfig(lr_scale=scale, no_decay=["head.*"]), preset("debug"))
    assert groups["layers.1.attention.o_proj.weight"].lr_scale == 0.75
    assert groups["mtp.0.block.attention.o_proj.weight"].lr_scale == 0.5
    assert groups["layers.2.ffn_norm.weight"].lr_scale == 0.5
    assert (groups["head.weight"].decays, groups["layers.2.ffn_norm.weight"].decays) == (False, True)


def test_muon_takes_the_matrices_of_the_hidden_layers() -> None:
    groups = parameter_groups(MuonConfig(adamw_lr_scale=0.5), preset("debug"))
    others = {name.split(".")[-2] for name, group in groups.items() if not group.hidden}
    assert {name for name in others if "norm" not in name} == {"embedding", "head", "router"}
    assert {group.lr_scale for group in groups.values() if group.hidden} == {1.0}
    assert {group.lr_scale for group in groups.values() if not group.hidden} == {0.5}
    assert {name.split(".")[-1] for name, group in groups.items() if group.fused == 2} == {"gate_up_proj"}


def test_an_expert_bias_is_frozen_by_its_own_name_and_with_its_router() -> None:
    bias, router = "layers.1.ffn.router.selection_bias", "layers.1.ffn.router.weight"
    assert is_frozen(bias, ["*.selection_bias"])
    assert not is_frozen(router, ["*.selection_bias"])
    assert is_frozen(bias, [router])
    assert not is_frozen(bias, ["layers.2.*"])


def _kept(config: ModelConfig, frozen: list[str], components: list[str]) -> int:
    of = [w for w in every_weight(config) if not is_frozen(w.name, frozen)]
    return sum(w.numel for w in of if not components or w.component.value in components)


def test_the_plan_counts_no_gradient_and_no_state_of_what_is_frozen() -> None:
    frozen = ["embedding.*", "layers.0.*", "layers.1.ffn.experts.*"]
    config, optimizer = preset("debug"), AdamWConfig(frozen=frozen)
    plan = make_plan(config_of(ParallelConfig(), optimizer=optimizer), ParallelDims(), H800)
    kept = _kept(config, frozen, [])
    every = _kept(config, [], [])
    assert kept < every
    memory = plan.memory
    assert (memory.parameters, memory.gradients, memory.optimizer) == (4 * every, 4 * kept, 8 * kept)
    assert "frozen: embedding.*, layers.0.*, layers.1.ffn.experts.*" in format_plan(plan)
    two = ParallelDims(dp_replicate=2, dp_shard=2)
    all_trained = make_plan(config_of(ParallelConfig()), two, H800)
    some = make_plan(config_of(ParallelConfig(), optimizer=optimizer), two, H800)
    for axis in ("dp", "dp_replicate"):
        assert getattr(some.traffic, axis) < getattr(all_trained.traffic, axis)
    assert some.memory.weight_copies <= all_trained.memory.weight_copies


def test_muon_keeps_half_of_adamws_state_for_hidden_matrices() -> None:
    config = preset("debug")
    plan = make_plan(config_of(ParallelConfig(), optimizer=MuonConfig()), ParallelDims(), H800)
    hidden = _kept(config, [], ["attention", "dense_ffn", "experts", "shared_experts", "mtp_projection"])
    assert plan.memory.optimizer == 8 * _kept(config, [], []) - 4 * hidden
    assert "optimizer 4 (hidden matrices) or 8, compute" in format_plan(plan)
    frozen = replace(MuonConfig(), frozen=["*.experts.*"])
    without = make_plan(config_of(ParallelConfig(), optimizer=frozen), ParallelDims(), H800)
    assert plan.memory.optimizer - without.memory.optimizer == 4 * _kept(config, [], ["experts"])
