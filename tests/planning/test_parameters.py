from dataclasses import fields, replace

import pytest
import torch
from torch import nn

from dsv3.config.model import ModelConfig
from dsv3.model.transformer import Transformer
from dsv3.planning import parameters
from tests.planning.presets import NAMES, count, preset

# DESIGN section 5: without MTP, and active.
PUBLISHED = {
    "16b": (15_706_484_224, 2_661_150_208),
    "moonlight_16b": (15_960_108_544, 2_914_774_528),
    "236b": (235_741_434_880, 21_375_800_320),
    "671b": (671_026_404_352, 37_552_282_624),
    "kimi_k2": (1_026_408_209_408, 32_861_477_888),
}


def parameter_count(module: nn.Module) -> int:
    """Parameters, each once, without buffers (the expert biases)."""
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(config: ModelConfig) -> Transformer:
    known = {f.name: getattr(config, f.name) for f in fields(config) if not f.name.startswith("_")}
    with torch.device("meta"):
        return Transformer(**known)


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name: str) -> None:
    config = preset(name)
    assert (parameters.total_without_mtp(config), parameters.active(config)) == PUBLISHED[name]


def test_671b_with_its_mtp_depth() -> None:
    assert parameters.total(preset("671b")) == 682_636_472_320
    assert count(preset("671b")).mtp == 682_636_472_320 - 671_026_404_352


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_of_the_model_is_in_the_table_and_no_other(name: str) -> None:
    config = preset(name)
    model = on_meta(config)
    table = {weight.name: weight.shape for weight in parameters.every_weight(config)}
    assert table == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert parameters.total(config) == count(config).total == parameter_count(model)


def test_components_are_those_of_the_modules() -> None:
    config = preset("debug")
    model = on_meta(config)
    counts = count(config)
    of = {name: p.numel() for name, p in model.named_parameters() if not name.startswith("mtp")}

    def summed(*parts: str) -> int:
        return sum(n for name, n in of.items() if any(part in name for part in parts))

    assert counts.embedding == summed("embedding")
    assert counts.head == summed("head.")
    assert counts.norms == summed("norm")
    attention = summed(".attention.") - summed("q_a_norm", "kv_a_norm")
    assert counts.attention == attention
    assert counts.router == summed("router")
    assert counts.experts == summed("ffn.experts") == 3 * 16 * parameters.expert(config)
    assert counts.shared_experts == summed("shared_experts")
    assert counts.dense_ffn == summed("layers.0.ffn.")
    assert counts.mtp == parameter_count(model.mtp)


def test_a_model_may_do_without_shared_experts() -> None:
    config = preset("16b")
    none = replace(config, moe=replace(config.moe, num_shared_experts=0))
    assert count(none).shared_experts == 0
    assert parameters.total(none) == parameter_count(on_meta(none))
