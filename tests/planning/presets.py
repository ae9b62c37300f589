"""The presets of conf/model as dataclasses, read without Hydra, and their parameters by component."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dsv3.config.model import (
    AttentionConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    RopeScaling,
    ScoreFunction,
)
from dsv3.planning import parameters
from dsv3.planning.parameters import Component, numel

CONF = Path(__file__).parents[2] / "conf"
NAMES = ["debug", "16b", "moonlight_16b", "236b", "671b", "kimi_k2"]


def preset(name: str) -> ModelConfig:
    node: dict[str, Any] = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())
    del node["defaults"]
    moe, rope = node.pop("moe"), node.pop("rope", {})
    moe["score_function"] = ScoreFunction[moe.get("score_function", "sigmoid")]
    rope["scaling"] = RopeScaling[rope.get("scaling", "none")]
    attention = AttentionConfig(**node.pop("attention"))
    return ModelConfig(**node, attention=attention, moe=MoEConfig(**moe), rope=RopeConfig(**rope))


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of each component of the main model; `mtp` is all of the MTP depths."""

    embedding: int
    head: int
    attention: int
    dense_ffn: int
    router: int
    experts: int
    shared_experts: int
    norms: int
    mtp: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def count(config: ModelConfig) -> ParameterCounts:
    main = parameters.main_model(config)
    names = [c.value for c in Component if c is not Component.mtp_projection]
    counts = {name: numel(w for w in main if w.component.value == name) for name in names}
    return ParameterCounts(**counts, mtp=sum(map(numel, parameters.mtp_modules(config))))
