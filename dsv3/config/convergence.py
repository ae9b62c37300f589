"""The convergence contract: say of every key if it changes what is learnt, or only how it is computed.

Two runs with equal learnt values, on equal data, learn the same up to rounding, whatever their layout. The
hash of these values stands in every run, checkpoint, export and logger, and a resume and task=compare say of
which kind a difference is (docs/configuration.md).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

from dsv3.config.accidents import OLDER
from dsv3.config.data import ROW_ORDER
from dsv3.config.registry import described_key
from dsv3.config.strict import to_yaml


class Kind(Enum):
    """The reach of a key."""

    learnt = "what is learnt"
    computed = "only how it is computed"


CONTRACT: dict[str, tuple[Kind, str]] = {
    "model": (Kind.learnt, ""),
    "model.attention.kernel": (Kind.computed, "kernels compute one function"),
    "model.path": (Kind.computed, "where the numbers were read; they count themselves"),
    "data._target_": (Kind.learnt, ""),
    "data.held_out": (Kind.learnt, ""),
    "data.shuffle": (Kind.learnt, ""),
    "data.document_mask": (Kind.learnt, ""),
    "data.packing": (Kind.learnt, ""),
    "data.sources": (Kind.learnt, ""),
    "data.fim_rate": (Kind.learnt, ""),
    "data.path": (Kind.computed, "where the data lies; its fingerprint counts"),
    "data.cache_dir": (Kind.computed, "where prepared data lies"),
    "data.cache_bytes": (Kind.computed, "how much of remote data is kept"),
    "data.held_out_path": (Kind.computed, "where the data lies; its fingerprint counts"),
    "data.dtype": (Kind.computed, "how the data is read; its fingerprint counts"),
    "data.eos_id": (Kind.computed, "how the data is read; its fingerprint counts"),
    "data.pad_id": (Kind.computed, "how the data is read; its fingerprint counts"),
    "data.verify": (Kind.computed, "what is looked at when a run starts"),
    "data.dataset": (Kind.computed, "where the data lies; its fingerprint counts"),
    "data.revision": (Kind.computed, "which data; its fingerprint counts"),
    "data.subset": (Kind.computed, "which data; its fingerprint counts"),
    "data.split": (Kind.computed, "which data; its fingerprint counts"),
    "data.held_out_split": (Kind.computed, "which data; its fingerprint counts"),
    "data.field": (Kind.computed, "which data; its fingerprint counts"),
    "data.separator": (Kind.computed, "which data; its fingerprint counts"),
    "data.max_skipped": (Kind.computed, "whether to go on; the fingerprint of what is read counts"),
    "data.lanes": (Kind.learnt, "the order of the rows"),
    "data.lane_rows": (Kind.learnt, "the order of the rows"),
    "data.shuffled_documents": (Kind.learnt, "the order of the rows"),
    "data.allow_change": (Kind.computed, "whether to go on; the fingerprint of what is read counts"),
    "tokenizer": (Kind.learnt, ""),
    "tokenizer.path": (Kind.computed, "where the tokenizer lies; its fingerprint counts"),
    "optimizer": (Kind.learnt, ""),
    "optimizer.fused": (Kind.computed, "kernels compute one function"),
    "schedule": (Kind.learnt, ""),
    "train.global_batch_size": (Kind.learnt, ""),
    "train.batch_ramp": (Kind.learnt, ""),
    "train.sequence_length": (Kind.learnt, ""),
    "train.seed": (Kind.learnt, ""),
    "train.clip_norm": (Kind.learnt, ""),
    "train.balance": (Kind.learnt, ""),
    "train.mtp_loss": (Kind.learnt, ""),
    "train.accidents": (Kind.learnt, "which steps are skipped"),
    "train.accidents.most": (Kind.computed, "whether to go on"),
    "train.accidents.within": (Kind.computed, "whether to go on"),
    "train.callbacks": (Kind.learnt, "a class of yours may change anything"),
    "train.steps": (Kind.computed, "how far; schedule.total_steps says what a step does"),
    "train.stop_after": (Kind.computed, "how far"),
    "train.microbatch_size": (Kind.computed, "gradients are summed over the global batch"),
    "train.prefetch": (Kind.computed, "when a batch is made, not what is in it"),
    "train.deterministic": (Kind.computed, "the last bits alone"),
    "train.log_every": (Kind.computed, ""),
    "train.checkpoint_every": (Kind.computed, ""),
    "train.evaluate_every": (Kind.computed, ""),
    "train.evaluate_tokens": (Kind.computed, "what is measured, not what is learnt"),
    "train.generate_every": (Kind.computed, ""),
    "train.generate_seconds": (Kind.computed, ""),
    "train.export_hf_every": (Kind.computed, ""),
    "train.export_hf_dtype": (Kind.computed, ""),
    "train.check_replicas_every": (Kind.computed, ""),
    "train.collect_garbage_every": (Kind.computed, ""),
    "precision": (Kind.learnt, ""),
    "precision.fp8.engine": (Kind.computed, "engines compute one function"),
    "precision.fp8.gather": (Kind.computed, "where a weight is quantized, not into what"),
    "checkpoint.load": (Kind.learnt, "the weights to start from: their identity counts, not their place"),
    "checkpoint.keep_last": (Kind.computed, ""),
    "checkpoint.keep_every": (Kind.computed, ""),
    "checkpoint.keep_best": (Kind.computed, ""),
    "checkpoint.async_save": (Kind.computed, ""),
    "parallel": (Kind.computed, ""),
    "compile": (Kind.computed, ""),
    "recompute": (Kind.computed, ""),
    "task": (Kind.computed, ""),
    "logger": (Kind.computed, ""),
    "hardware": (Kind.computed, ""),
    "launch": (Kind.computed, ""),
    "profile": (Kind.computed, ""),
    "run": (Kind.computed, ""),
}
"""Kind and, where it is not obvious, reason by key. The longest entry that a key begins with decides.

A node stands here by its name alone where new keys of it are surely of its kind; each key of the others is
listed, so that a test asks for a decision on a new one.
"""

EXTENT = ("train.steps", "train.stop_after")
"""The computed keys that say how far a run goes; a note tells them apart."""

ADDED: dict[str, Any] = {
    "data.packing": "concat",
    "data.fim_rate": 0.0,
    "train.batch_ramp.start": None,
    "train.batch_ramp.tokens": None,
    "train.batch_ramp.increment": None,
    **{f"train.accidents.{key}": value for key, value in OLDER.items()},
}
"""Learnt keys that runs of older code lack, by the value at which such a run learns the same: with that value
they leave the hash as it was."""

LOAD = "checkpoint.load"

ABSENT = "absent"
"""In place of a value that an older or another config does not have."""

HASH_LENGTH = 16

_HYDRAS_OWN = ("_recursive_", "_convert_")


class Difference(NamedTuple):
    """A key on which two configs differ; `a` or `b` is ABSENT where one does not have it."""

    key: str
    a: Any
    b: Any
    kind: Kind

    def __str__(self) -> str:
        return f"{self.key} {shown(self.a)} -> {shown(self.b)}"


def entry(key: str) -> str | None:
    """Return the entry of CONTRACT that decides on `key`; None where there is none."""
    parts = described_key(key).split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((name for name in names if name in CONTRACT), None)


def kind(key: str) -> Kind:
    """Return the kind of a dotted key; a key that the contract does not know counts as learnt."""
    name = entry(key)
    return CONTRACT[name][0] if name else Kind.learnt


def flatten(node: Any, path: str = "") -> dict[str, Any]:
    """Return the leaves of nested dicts, and of dicts in lists, by their dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        nested = isinstance(value, list) and any(isinstance(item, dict | list) for item in value)
        inner = nested or isinstance(value, dict)
        leaves |= flatten(value, f"{path}{key}.") if inner else {f"{path}{key}": value}
    return leaves


def learnt_values(config: Any) -> dict[str, Any]:
    """Return the values that decide what is learnt, by dotted key; without the place of the weights.

    `config` is a completed Config, or the `config` of a training.yaml. UserError is never raised: a stored
    config is data, whatever it holds.
    """
    node = config if isinstance(config, dict) else to_yaml(config)
    return {
        key: value
        for key, value in flatten(node).items()
        if kind(key) is Kind.learnt
        and key != LOAD
        and key.rpartition(".")[2] not in _HYDRAS_OWN
        and not (key in ADDED and value == ADDED[key])
    }


def convergence_hash(
    config: Any,
    data_fingerprint: str | None,
    tokenizer_fingerprint: str | None,
    weights: str | None = None,
    history: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Return 16 hex characters that are equal for runs that learn the same.

    Args:
        config: completed, with no value left to fill in; or the `config` of a training.yaml.
        data_fingerprint: of the training text.
        tokenizer_fingerprint: None for data that is token ids already.
        weights: identity of the weights that the run began with; None for initial weights.
        history: a `{step, convergence}` for every stretch that a resume with other learnt values ended.
    """
    content = {
        "values": learnt_values(config),
        "data": data_fingerprint,
        "tokenizer": tokenizer_fingerprint,
        "weights": weights,
        "history": [[past["step"], past["convergence"]] for past in history],
        "row_order": ROW_ORDER,
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_LENGTH]


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    """Return the keys on which two stored configs differ, learnt ones first; nested or by dotted keys.

    The nodes `run` and `task` are left out: they say where a run lies and what a command did with it.
    """
    left, right = flatten(dict(a)), flatten(dict(b))
    found = [
        Difference(key, left.get(key, ABSENT), right.get(key, ABSENT), kind(key))
        for key in dict.fromkeys([*left, *right])
        if key.partition(".")[0] not in ("run", "task") and key.rpartition(".")[2] not in _HYDRAS_OWN
    ]
    found = [each for each in found if each.a != each.b]
    return sorted(found, key=lambda each: each.kind is not Kind.learnt)


def told_differences(found: Sequence[Difference]) -> list[str]:
    """Return differences as text for people, a node that appears or vanishes as one entry.

    `parallel.fsdp null -> on` stands for the keys of the node; what is null on one side and absent on the
    other is no difference to anyone.
    """
    nodes = {d.key: d for d in found if {None, ABSENT} == {_hashable(d.a), _hashable(d.b)}}
    told: dict[str, None] = {}
    for d in found:
        if d.key in nodes:
            continue
        above = next((key for key in nodes if d.key.startswith(f"{key}.")), None)
        if above is not None:
            told[f"{above} {'null -> on' if d.a == ABSENT else 'on -> null'}"] = None
        elif not (d.key.endswith("._target_") and ABSENT in (d.a, d.b)):
            told[str(d)] = None
    return list(told)


def _hashable(value: Any) -> Any:
    return str(value) if isinstance(value, list | dict) else value


def shown(value: Any) -> str:
    """Return a value as it is typed: `null`, `true`, `[0.8,0.9]`."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(shown, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)
