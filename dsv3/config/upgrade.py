"""Read configs that older code has stored: translate renamed classes and keys to those of today.

A run directory keeps config.yaml and overrides.yaml, a checkpoint keeps model.yaml. Every reader of these
files passes what it reads through `upgrade_node` or `upgrade_override`, so that old runs resume and evaluate.
To rename a class that a `_target_` may name, or a config key, add a line to the tables below.
"""

import re
from typing import Any

from dsv3.config.accidents import OLDER
from dsv3.config.overrides import split_override

TARGETS = {
    "dsv3.data.table.TokensData": "dsv3.data.token_table.TokensData",
    "dsv3.data.tokenizer.LocalTokenizer": "dsv3.tokens.tokenizer.LocalTokenizer",
    "dsv3.data.tokenizer.TrainedTokenizer": "dsv3.tokens.tokenizer.TrainedTokenizer",
    "dsv3.metrics.logger.ConsoleLogger": "dsv3.metrics.loggers.ConsoleLogger",
    "dsv3.metrics.logger.NoLogger": "dsv3.metrics.loggers.NoLogger",
    "dsv3.metrics.tensorboard.TensorboardLogger": "dsv3.metrics.loggers.TensorboardLogger",
    "dsv3.parallel.context.ContextParallel": "dsv3.parallel.context_parallel.ContextParallel",
    "dsv3.parallel.expert.ExpertParallel": "dsv3.parallel.expert_parallel.ExpertParallel",
    "dsv3.parallel.pipeline.Pipeline": "dsv3.parallel.pipeline_parallel.PipelineParallel",
    "dsv3.parallel.recompute.Recompute": "dsv3.parallel.activation_checkpoint.ActivationCheckpointing",
    "dsv3.parallel.tensor.TensorParallel": "dsv3.parallel.tensor_parallel.TensorParallel",
    "dsv3.precision.fp8.BlockFP8": "dsv3.fp8.convert_model.BlockFP8",
    "dsv3.tasks.compare.Compare": "dsv3.tasks.compare.CompareTask",
    "dsv3.tasks.evaluate.Evaluate": "dsv3.tasks.evaluate.EvaluateTask",
    "dsv3.tasks.generate.Generate": "dsv3.tasks.generate.GenerateTask",
    "dsv3.tasks.plan.Plan": "dsv3.tasks.plan.PlanTask",
    "dsv3.tasks.train.Train": "dsv3.tasks.train.TrainTask",
    "dsv3.tasks.verify.Verify": "dsv3.tasks.verify.VerifyTask",
    "dsv3.training.adamw.BF16MomentAdamW": "dsv3.training.optimizer.BF16MomentAdamW",
}
"""Today's class by the `_target_` that older code has stored; classes that kept their path are not listed."""

KEYS = {"parallel.smallest_world": "parallel.min_world_size"}
"""Today's config key by the one that older code has stored."""

ADDED = {"dsv3.data.sources.TextData": {"max_skipped": 1.0}}
"""By class the keys that older code did not have, with the values at which today's does what that did."""

ADDED_NODES = {"train": {"accidents": OLDER}}
"""By node the nodes that older code did not have, with the values at which today's does what that did."""

RECOUNTED = {"train.evaluate_batches": "train.evaluate_tokens"}
"""Today's config key by one that counted in another unit. null says the same in both, a number nothing today:
the default of today takes its place, and a resume says so."""

_OLD_TARGET = re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, TARGETS))})(?![\w.])")


def upgrade_target(target: Any) -> Any:
    """Return today's path of the class that a stored `_target_` names; anything else stays as it is."""
    return TARGETS.get(target, target) if isinstance(target, str) else target


def upgrade_node(node: Any, path: str = "") -> Any:
    """Return a stored config with today's classes and keys; `path` is the node's place below the root.

    `node` is plain YAML: dicts, lists and values. Its order stays.
    """
    if isinstance(node, list):
        return [upgrade_node(item, f"{path}.{number}") for number, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    upgraded: dict[Any, Any] = {}
    for key, value in node.items():
        place = f"{path}.{key}" if path else str(key)
        if place in RECOUNTED:
            if value is None:
                upgraded[_name(RECOUNTED[place])] = None
            continue
        current = _name(KEYS[place]) if place in KEYS else key
        upgraded[current] = upgrade_target(value) if key == "_target_" else upgrade_node(value, place)
    target = upgraded.get("_target_")
    added: dict[str, Any] = dict(ADDED.get(target, {})) if isinstance(target, str) else {}
    added |= ADDED_NODES.get(path, {})
    return upgraded | {key: value for key, value in added.items() if key not in upgraded}


def recounted_values(config: Any) -> dict[str, Any]:
    """Return the numbers of a stored config that say nothing today, by the keys of RECOUNTED."""
    found = {}
    for key in RECOUNTED:
        parent, _, name = key.rpartition(".")
        node = config.get(parent) if isinstance(config, dict) else None
        if isinstance(node, dict) and node.get(name) is not None:
            found[key] = node[name]
    return found


def upgrade_override(override: str) -> str | None:
    """Return a stored override, such as `parallel.smallest_world=2`, with today's classes and keys.

    A whole node as a value (`parallel={smallest_world:2}`) is translated too. Returns None for a number that
    says nothing today, which is no longer typed.
    """
    pair = split_override(override)
    if pair is None:
        return override
    key, value = pair
    prefix = override[: override.index(key)]
    if key in RECOUNTED:
        return f"{prefix}{RECOUNTED[key]}=null" if value == "null" else None
    if value.startswith("{"):
        for old, new in KEYS.items():
            if key == old.rpartition(".")[0]:
                value = re.sub(rf"\b{_name(old)}(?=\s*:)", _name(new), value)
        for old, new in RECOUNTED.items():
            if key == old.rpartition(".")[0]:
                value = re.sub(rf"\b{_name(old)}(?=\s*:\s*null\b)", _name(new), value)
                value = re.sub(rf"(,\s*)?\b{_name(old)}\s*:\s*\d+(?(1)|\s*,?\s*)", "", value)
                if re.fullmatch(r"\{\s*\}", value):
                    return None
    if value.startswith("{") or key.rpartition(".")[2] == "_target_":
        value = _OLD_TARGET.sub(lambda found: TARGETS[found[1]], value)
    return f"{prefix}{KEYS.get(key, key)}={value}"


def _name(key: str) -> str:
    return key.rpartition(".")[2]
