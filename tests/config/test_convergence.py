"""The convergence contract: every key is of one kind, and the hash follows the learnt ones alone."""

import copy
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_type_hints

import pytest

from dsv3.config.convergence import (
    ABSENT,
    CONTRACT,
    LOAD,
    Kind,
    convergence_hash,
    differences,
    entry,
    flatten,
    kind,
    learnt_values,
)
from dsv3.config.registry import SCHEMAS
from dsv3.config.strict import to_yaml
from dsv3.launch.job import plan_job
from tests.harness.composing import strict_config


def _keys(schema: Any, prefix: str) -> Iterator[str]:
    """Yield every key of a schema, nested nodes and `_target_` included."""
    hints = get_type_hints(schema)
    for field in fields(schema):
        hint, key = hints[field.name], f"{prefix}{field.name}"
        nested = next((each for each in (hint, *get_args(hint)) if is_dataclass(each)), None)
        if nested is not None:
            yield from _keys(nested, f"{key}.")
        if nested is not hint and field.name not in ("_recursive_", "_convert_"):
            yield key


@cache
def every_key() -> list[str]:
    """Return the keys of train.py by all schemas; those of convert.py are no run's."""
    found: dict[str, None] = {}
    for name, schema in SCHEMAS.items():
        if name != "convert":
            found |= dict.fromkeys(_keys(schema, "" if name == "config" else f"{name.partition('/')[0]}."))
    return list(found)


def test_every_key_has_a_kind_and_every_entry_a_key() -> None:
    assert [key for key in every_key() if entry(key) is None] == []
    assert set(CONTRACT) - {entry(key) for key in every_key()} == set()
    assert {kind(key) for key in every_key()} == set(Kind)


def test_nodes_that_hold_both_kinds_name_each_of_their_keys() -> None:
    """A key that is new in `train`, `data` or `checkpoint` needs a decision: no entry has the rest."""
    for node in ("train", "data", "checkpoint"):
        assert entry(f"{node}.brand_new") is None
        assert kind(f"{node}.brand_new") is Kind.learnt


def test_the_hash_follows_each_learnt_key_and_no_other() -> None:
    base: dict[str, Any] = flatten(to_yaml(strict_config([])))
    plain = convergence_hash(base, "data", "tokenizer")
    for key in set(every_key()) | set(base):
        changed = convergence_hash(base | {key: "another value"}, "data", "tokenizer")
        own = key.rpartition(".")[2] in ("_recursive_", "_convert_") or key == LOAD
        assert (changed != plain) is (kind(key) is Kind.learnt and not own), key


def test_the_hash_follows_data_tokenizer_first_weights_and_history() -> None:
    values = {"optimizer": {"lr": 0.1}}
    past = [{"step": 3, "convergence": "0123456789abcdef"}]
    hashes = [
        convergence_hash(values, "data", "tokenizer"),
        convergence_hash(values, "other", "tokenizer"),
        convergence_hash(values, "data", None),
        convergence_hash(values, "data", "tokenizer", "weights"),
        convergence_hash(values, "data", "tokenizer", None, past),
        convergence_hash(values, "data", "tokenizer", None, [past[0] | {"step": 4}]),
    ]
    assert len(set(hashes)) == len(hashes)
    assert {len(each) for each in hashes} == {16}
    assert convergence_hash(copy.deepcopy(values), "data", "tokenizer") == hashes[0]


LAYOUTS = [
    [],
    ["parallel=fsdp", "launch.nproc=4", "train.microbatch_size=1"],
    [
        "parallel=tp_ep",
        "parallel.degrees.tp=2",
        "parallel.degrees.ep=2",
        "launch.nproc=2",
        "recompute=full",
        "logger=none",
    ],
    [
        "parallel=pp",
        "parallel.degrees.pp=2",
        "launch.nproc=2",
        "train.checkpoint_every=7",
        "compile=on",
        "run.dir=/elsewhere",
    ],
]


def test_an_equal_run_has_the_equal_hash_on_every_layout() -> None:
    """Values that are filled in count as what they became: a typed default is no difference either."""
    typed = ["train.global_batch_size=8", "schedule.total_steps=300", "train.balance.bias_speed=0.001"]
    found = set()
    for layout in [*LAYOUTS, typed]:
        config = plan_job(strict_config(["precision=fp32", *layout]), []).config
        found.add(convergence_hash(config, "data", "tokenizer"))
    assert len(found) == 1


@pytest.mark.parametrize("changed", ["train.steps=200", "train.global_batch_size=16", "precision=bf16"])
def test_what_fills_in_a_learnt_value_counts(changed: str) -> None:
    """train.steps itself is only how far, but it ends a schedule that has no end of its own."""
    plain, other = (plan_job(strict_config(more), []).config for more in ([], [changed]))
    assert learnt_values(plain) != learnt_values(other)


def test_differences_name_the_learnt_ones_first() -> None:
    one = {"parallel": {"degrees": {"tp": 1}}, "optimizer": {"lr": 0.1, "eps": 1e-8}, "run": {"dir": "/a"}}
    two = {"parallel": {"degrees": {"tp": 2}}, "optimizer": {"lr": 0.2}, "run": {"dir": "/b"}}
    found = differences(one, two)
    assert [(each.key, each.a, each.b, each.kind) for each in found] == [
        ("optimizer.lr", 0.1, 0.2, Kind.learnt),
        ("optimizer.eps", 1e-8, ABSENT, Kind.learnt),
        ("parallel.degrees.tp", 1, 2, Kind.computed),
    ]
    assert str(found[0]) == "optimizer.lr 0.1 -> 0.2"
    assert differences(flatten(one), one) == []
