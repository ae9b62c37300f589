"""The presets of conf/model as dataclasses, read without Hydra."""

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
