"""Every key of every schema: typed, it stands in the config of each task that reads it, and does something.

A new key needs an entry in tests/config/key_effects.py.
"""

import copy
import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from dsv3.config.convergence import CONTRACT, Kind, entry, kind
from dsv3.config.hardware import KernelConfig
from dsv3.config.overrides import compose as compose_overrides
from dsv3.config.registry import SCHEMAS
from dsv3.config.strict import strict
from dsv3.data.corpus import TextCorpus
from dsv3.errors import UserError
from dsv3.launch.checkpoint_defaults import Composition, compose_over_checkpoint
from dsv3.launch.job import Job, plan_job
from dsv3.launch.typed_keys import why_inert
from dsv3.programs import TRAIN
from tests.config.key_effects import EFFECTS, effect, learning_rates, training, weights
from tests.harness.commands import PlannedCommand, TrainCommand
from tests.harness.composing import compose
from tests.harness.tiny import MODEL, TRAINING

pytestmark = pytest.mark.slow


class SchemaKey(NamedTuple):
    """A key that can be typed, under one of the schemas that have it."""

    schema: str
    name: str
    type: Any

    @property
    def beside(self) -> list[str]:
        """The choice of the schema, with what it needs."""
        group, _, choice = self.schema.partition("/")
        needs = {
            "data/text": ["data.path={path}"],
            "data/tokens": ["data.path={tokens}"],
            "data/shards": ["data.path={shards}"],
            "data/hf": ["data.dataset={stream}"],
            "data/mixture": ["+data.sources={one:{source:text,path:'{path}',weight:1}}"],
            "tokenizer/local": ["tokenizer.path={tokenizer}"],
            "task/verify": ["task.path=x"],
            "task/compare": ["task.runs=x"],
            "task/prepare": ["task.input=[x]", "task.output=x"],
            "task/replay": ["task.run=x", "task.step=1"],
            "precision": ["precision=fp8"] if ".fp8" in self.name else [],
            "parallel": ["parallel=tp_ep"] if self.name.count(".") > 1 else [],
        }
        return [f"{group}={choice}"] * bool(choice) + needs.get(self.schema, [])


def _keys(schema: Any, prefix: str, name: str) -> Iterator[SchemaKey]:
    hints = get_type_hints(schema)
    for field in (each.name for each in fields(schema) if not each.name.startswith("_")):
        hint = hints[field]
        nested = next((kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)), None)
        if nested is not None:
            yield from _keys(nested, f"{prefix}.{field}", name)
        else:
            yield SchemaKey(name, f"{prefix}.{field}", hint)


def all_keys() -> list[SchemaKey]:
    """Every key of train.py's schemas, those of the plain nodes included."""
    found = []
    for node, hint in get_type_hints(SCHEMAS["config"]).items():
        if node in ("train", "checkpoint", "run"):
            found += list(_keys(hint, node, node))
    for name, schema in SCHEMAS.items():
        # model=hf has the keys of any model, and its own path.
        keys = [] if name in ("config", "convert") else _keys(schema, name.partition("/")[0], name)
        found += [key for key in keys if name != "model/hf" or key.name == "model.path"]
    return found


KEYS = all_keys()


def another(key: SchemaKey, value: Any) -> Any:
    """Return a value of the key's type that is not `value`."""
    kinds = [kind for kind in (get_args(key.type) or (key.type,)) if kind is not NoneType]
    kind = kinds[0]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return next(each.name for each in kind if each.name != value)
    if isinstance(value, bool):
        return not value
    if value == []:
        return ["x"]
    if isinstance(value, list):
        return [*value, *value] if value and isinstance(value[0], str) else [item / 2 for item in value]
    if isinstance(value, int):
        return value * 2 if value > 1 else value + 1
    if isinstance(value, float):
        return value / 2 if value else 0.5
    if get_origin(kind) is list:
        return ["x"]
    return {int: 2, float: 0.5, bool: True}.get(kind, "x")


OTHER = {
    "model.attention.qk_rope_head_dim": 16,
    "model.moe.num_groups": 2,
    "model.moe.top_k_groups": 2,
    "model.moe.top_k": 1,
    "model.rope.beta_fast": 4.0,
    "model.rope.beta_slow": 8.0,
    "model.num_dense_layers": 0,
    "optimizer.betas": [0.8, 0.9],
    "optimizer.etas": [0.4, 1.3],
    "optimizer.eps": 1e-3,
    "parallel.degrees.pp": 4,
    "parallel.degrees.dp_shard": 4,
    "parallel.degrees.cp": 4,
    "parallel.degrees.tp": 4,
    "parallel.degrees.ep": 2,
    "schedule.warmup_steps": 2,
    "schedule.at": [0.3, 0.6],
    "tokenizer.vocab_size": 280,
}
"""Other values of keys whose neighbours forbid the one that is made from the type."""


DATASET_CARD = """---
configs:
- config_name: first
  default: true
  data_files:
  - {split: train, path: train.jsonl}
  - {split: validation, path: more.jsonl}
- config_name: second
  data_files:
  - {split: train, path: more.jsonl}
---
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, text: Path, cache: Path) -> dict[str, str]:
    """Files that values name."""
    import numpy as np

    from dsv3.tokens.shard_index import ShardIndex, TokenizerReference
    from dsv3.tokens.tokenizer import Tokenizer, TrainedTokenizer
    from tests.data.token_formats import shards

    folder = tmp_path_factory.mktemp("files")
    np.save(folder / "tokens.npy", np.arange(40 * 33).reshape(40, 33) % 256)
    np.save(folder / "tokens2.npy", np.arange(40 * 33).reshape(40, 33) % 255)
    other = folder / "other"
    other.mkdir()
    (folder / "empty").mkdir()
    for number, path in enumerate(sorted(text.iterdir())[:100]):
        (other / f"{number}.txt").write_text(path.read_text().upper())
    (folder / "mixed").mkdir()
    for number, path in enumerate(sorted(text.iterdir())[:20]):
        (folder / "mixed" / path.name).write_bytes(path.read_bytes() + b"\xff" * (number % 5 == 0))
    with (folder / "lines.jsonl").open("w") as lines:
        for path in sorted(text.iterdir())[:60]:
            line = {"text": path.read_text(), "body": path.read_text().upper()}
            lines.write(json.dumps(line) + "\n")
    for name in ("stream", "stream2"):
        (folder / name).mkdir()
        lines_of = (folder / "lines.jsonl").read_text().splitlines(keepends=True)[name == "stream2" :]
        (folder / name / "train.jsonl").write_text("".join(lines_of))
        (folder / name / "more.jsonl").write_text("".join(lines_of[:12]))
        (folder / name / "README.md").write_text(DATASET_CARD)
    for suffix, size in (("", 300), ("2", 280)):
        texts = (path.read_text() for path in text.iterdir())
        TrainedTokenizer(size).prepare(texts, folder / f"prepared{suffix}").save(
            folder / f"tokenizer{suffix}"
        )
    documents = np.array_split(np.arange(3000) % 256, np.random.default_rng(0).choice(3000, 40).tolist())
    for name, chosen in (("shards", documents), ("shards2", documents[3:])):
        own = Tokenizer.from_file(folder / "tokenizer")
        own.save(shards(folder / name, [ids.tolist() for ids in chosen]) / "tokenizer")
        reference = TokenizerReference(own.fingerprint(), "tokenizer")
        index = ShardIndex.read(folder / name)
        ShardIndex(index.dtype_name, index.splits, own.size, tokenizer=reference).write(folder / name)
    (np.arange(4000) % 200).astype(np.uint16).tofile(folder / "flat.bin")
    return {
        "shards": str(folder / "shards"),
        "shards2": str(folder / "shards2"),
        "flat": str(folder / "flat.bin"),
        "path": str(text),
        "other": str(other),
        "tokens": str(folder / "tokens.npy"),
        "tokens2": str(folder / "tokens2.npy"),
        "empty": str(folder / "empty"),
        "mixed": str(folder / "mixed"),
        "lines": str(folder / "lines.jsonl"),
        "stream": str(folder / "stream"),
        "stream2": str(folder / "stream2"),
        "tokenizer": str(folder / "tokenizer"),
        "tokenizer2": str(folder / "tokenizer2"),
    }


BASE = [
    *MODEL,
    *TRAINING,
    "hardware=cpu",
    "model.mtp_depths=1",
    "model.moe.num_shared_experts=1",
    "model.moe.num_groups=4",
    "model.moe.top_k_groups=1",
    "model.num_dense_layers=1",
    "train.steps=30",
    "train.balance.loss_weight=0.1",
    "schedule.warmup_steps=0",
    "train.microbatch_size=2",
]


@cache
def composed(beside: tuple[str, ...]) -> DictConfig:
    """The config of BASE and more, composed once; the task is train unless it says another."""
    merged = {override.partition("=")[0]: override for override in [*BASE, *beside]}
    if "tokenizer=local" in beside:
        del merged["tokenizer.vocab_size"]
    groups = [override for override in merged.values() if "." not in override.partition("=")[0]]
    values = [override for override in merged.values() if override not in groups]
    command = Composition([*groups, *values])
    return compose_over_checkpoint(compose(list(command.overrides)), command)


def filled(text: str, files: dict[str, str]) -> str:
    """Return a value with the names of files filled in."""
    for name, path in files.items():
        text = text.replace(f"{{{name}}}", path)
    return text


def job_with(key: SchemaKey, value: Any, beside: tuple[str, ...]) -> Job:
    """The planned job with one value of the key."""
    config = copy.deepcopy(composed(beside))
    if value is not ...:
        OmegaConf.update(config, key.name, value, force_add=True)
    told = [] if value is ... else [f"{key.name}={_typed(value)}"]  # a batch script repeats what was typed
    job = plan_job(strict(config), told)
    if value not in (None, ...) and key.name not in UNTYPED:  # null is filled in
        assert _equal(leaf(job, key.name), value), key.name
    return job


_OBSERVED: dict[tuple[object, str], object] = {}


def observed(key: SchemaKey, value: Any, beside: tuple[str, ...]) -> object:
    """What is observed with one value; a refusal is an observation too."""
    found = effect(key.schema, key.name)
    assert found is not None
    try:
        job = job_with(key, value, beside)
        same = (found.observe, repr(job.config))
        if same not in _OBSERVED:  # most keys of a schema share the observation of their defaults
            _OBSERVED[same] = found.observe(job)  # type: ignore[operator]
        return _OBSERVED[same]
    except UserError as error:
        return "refused", str(error)


def observations(key: SchemaKey, files: dict[str, str]) -> tuple[object, object]:
    """What is observed with the key's default, and with another value."""
    found = effect(key.schema, key.name)
    assert found is not None
    data = ["data=text", "data.path={path}"] if key.name.split(".")[0] != "data" else []
    merged = {o.partition("=")[0]: o for o in [*data, *key.beside, *found.beside]}
    beside = tuple(filled(override, files) for override in merged.values())
    one: Any
    if found.values is not None:
        one, other = (yaml.safe_load(filled(value, files)) for value in found.values)
    else:
        one = OmegaConf.to_container(composed(beside), enum_to_str=True)
        for name in key.name.split("."):
            one = one[name]
        other = OTHER.get(key.name, another(key, one))
    return observed(key, one, beside), observed(key, other, beside)


MAY_BE_REFUSED = {
    ("model", "model.attention.kernel"),
    ("precision", "precision.fp8.engine"),
    ("data/text", "data.max_skipped"),
    ("data/tokens", "data.packing"),
    ("data/tokens", "data.fim_rate"),
    *((choice, f"data.{key}") for choice in ("data/hf", "data/tokens") for key in ("packing", "fim_rate")),
    ("optimizer/rprop", "optimizer.no_decay"),
}
"""Keys whose other value this machine or the schema refuses, which is seen as well."""


def test_every_key_has_an_entry_and_every_entry_a_key() -> None:
    missing = [f"{key.schema}: {key.name}" for key in KEYS if effect(key.schema, key.name) is None]
    assert not missing, "say in tests/config/key_effects.py what these do"
    used = [id(effect(key.schema, key.name)) for key in KEYS]
    unused = [name for name, entry in EFFECTS.items() if id(entry) not in used and entry.observe != "null"]
    assert not unused


@pytest.mark.parametrize("schema", sorted({key.schema for key in KEYS}))
def test_another_value_of_a_key_is_seen(
    schema: str, files: dict[str, str], cache: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSV3_CACHE", str(cache))
    monkeypatch.setattr("dsv3.launch.job.visible_gpus", list)
    # The whole library would take half a minute.
    monkeypatch.setattr("dsv3.data.sources.StdlibCorpus", lambda: TextCorpus(files["path"]))
    same, unlearnt = [], []
    for key in (key for key in KEYS if key.schema == schema):
        found = effect(key.schema, key.name)
        assert found is not None
        if not isinstance(found.observe, str) and "{run}" not in str(found.values):
            one, other = observations(key, files)
            refusals = [each for each in (one, other) if isinstance(each, tuple) and each[0] == "refused"]
            if repr(one) == repr(other) or (refusals and (key.schema, key.name) not in MAY_BE_REFUSED):
                same.append((key.name, refusals))
            # A key that changes the weights by more than rounding decides what is learnt.
            digests = isinstance(one, tuple) and isinstance(other, tuple) and one[0] != other[0]
            changes = found.observe is learning_rates or (found.observe is training and digests)
            reason = CONTRACT.get(entry(key.name) or "", (None, ""))[1]
            if changes and not refusals and not reason and kind(key.name) is not Kind.learnt:
                unlearnt.append(key.name)
    assert not same
    assert not unlearnt


def leaf(job: Job, key: str) -> Any:
    """Return the value of a key in the config of a job, enums by name."""
    node: Any = job.config
    for name in key.split("."):
        node = getattr(node, name)
    return node.name if isinstance(node, Enum) else list(node) if isinstance(node, tuple) else node


def values_of(key: SchemaKey, files: dict[str, str]) -> tuple[Any, Any]:
    """Return the key's default, as composed, and another value, as plain YAML."""
    found = effect(key.schema, key.name)
    assert found is not None
    one: Any = OmegaConf.to_container(composed(tuple(filled(o, files) for o in key.beside)), enum_to_str=True)
    for name in key.name.split("."):
        one = one[name]
    if found.values is not None:
        chosen = [yaml.safe_load(filled(value, files)) for value in found.values]
        if isinstance(one, dict):  # an empty one cannot be typed, and its entries win one by one
            return {name: value / 2 for name, value in chosen[1].items()}, chosen[1]
        return one, next(value for value in chosen if value != one)
    return one, OTHER.get(key.name, another(key, one))


UNTYPED = {
    *("run.resume", "run.dir", "run.allow_targets", "checkpoint.load", "model.path", "train.callbacks"),
    "data.sources",
    *(f"hardware.kernels_fp32.{f.name}" for f in fields(KernelConfig)),  # a node of calibrated hardware alone
}
"""Keys with tests of their own, where they do not stand in the config as they are typed."""


def rounds() -> list[list[str]]:
    """Return the schemas of all keys, with at most one of each group in a round."""
    left: dict[str, list[str]] = {}
    for schema in dict.fromkeys(key.schema for key in KEYS):
        left.setdefault(schema.partition("/")[0], []).append(schema)
    found = []
    while any(left.values()):
        found.append([schemas.pop() for schemas in left.values() if schemas])
    return found


@pytest.mark.parametrize("schemas", rounds(), ids=lambda schemas: schemas[-1])
def test_a_typed_value_wins_over_an_experiment(
    schemas: list[str], files: dict[str, str], here: Path, tmp_path: Path
) -> None:
    """Equal to its default or not: the experiment has the other value of the two."""
    keys = [key for key in KEYS if key.schema in schemas and key.name not in UNTYPED]
    values = {key.name: values_of(key, files) for key in keys}
    beside = dict.fromkeys(filled(override, files) for key in keys for override in key.beside)
    chosen = [override for override in beside if override.partition("=")[0] not in values]
    (tmp_path / "experiments").mkdir()
    for typed, other in ((0, 1), (1, 0)):
        nested = OmegaConf.create()
        for name, pair in values.items():
            OmegaConf.update(nested, name, pair[other])
        text = f"# @package _global_\n{OmegaConf.to_yaml(nested)}"
        (tmp_path / "experiments" / "below.yaml").write_text(text)
        told = [f"{name}={_typed(pair[typed])}" for name, pair in values.items()]
        overrides = TRAIN.prepare(["experiments=below", *chosen, *told])
        composed = compose_overrides(overrides, [f"file://{tmp_path}"])
        config: Any = OmegaConf.to_container(composed, enum_to_str=True)
        for name, pair in values.items():
            value = config
            for part in name.split("."):
                value = value[part]
            assert _equal(value, pair[typed]), name


def _equal(found: Any, typed: Any) -> bool:
    if None in (found, typed):
        return found is typed
    if isinstance(typed, float) or isinstance(found, float):
        return float(found) == float(typed)
    if isinstance(found, list):
        return bool([each.name if isinstance(each, Enum) else each for each in found] == typed)
    return str(found) == str(typed)


def _typed(value: Any) -> str:
    """Return a plain value as one types it."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_typed(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_typed, value)) + "]"
    return (
        {None: "null", True: "true", False: "false"}.get(value, str(value))
        if not isinstance(value, int | float) or isinstance(value, bool)
        else str(value)
    )


def _rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def _exported(run: Path) -> str:
    """Return the headers of a run's exports."""
    headers = [file.read_bytes()[:10_000] for file in run.glob("hf/*/*.safetensors")]
    return "".join(header.decode(errors="replace") for header in headers)


def _log(run: Path, begins: str) -> int:
    lines = (run / "log.txt").read_text().splitlines()
    return sum(line.strip().startswith(begins) for line in lines)


def test_keys_of_the_training_loop_are_seen_in_the_files_of_a_run(
    commands: TrainCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three runs: in the second and third, several keys that show in different places differ."""
    collected: list[str] = []
    run = {name: tmp_path / name for name in ("base", "other", "stopped")}
    current = ["base"]
    collect = gc.collect

    def counted(*arguments: int) -> int:
        collected.append(current[0])
        return collect(*arguments)

    monkeypatch.setattr("dsv3.training.callbacks.gc.collect", counted)
    every = {"log": 1, "checkpoint": 2, "evaluate": 2, "generate": 2, "export_hf": 0, "collect_garbage": 50}
    base = [f"train.{name}_every={number}" for name, number in every.items()]
    base += ["train.evaluate_tokens=64", "train.balance.bias_speed=0.01", "train.steps=4"]
    commands.train(run["base"], *base)
    current[0] = "other"
    other = {"log": 3, "checkpoint": 4, "evaluate": 3, "generate": 0, "export_hf": 6, "collect_garbage": 2}
    changed = [f"train.{name}_every={number}" for name, number in other.items()]
    commands.train(run["other"], *base, *changed, "train.steps=6", "hardware.peak_flops_fp32=1e12")
    current[0] = "stopped"
    own = "{own:{_target_:dsv3.training.callbacks.CollectGarbage,every:1}}"
    commands.train(
        run["stopped"],
        *base,
        "train.stop_after=2",
        "train.generate_seconds=1e-9",
        "train.export_hf_every=2",
        "train.export_hf_dtype=fp8",
        "profile=on",
        f"train.callbacks={own}",
        "profile.wait=0",
        "profile.steps=1",
    )
    seen: dict[str, Callable[[Path], object]] = {
        "train.steps": lambda run: len(_rows(run)),
        "train.log_every": lambda run: _log(run, "step "),
        "train.checkpoint_every": lambda run: _steps(run)[0],
        "train.evaluate_every": lambda run: [row["evaluation_loss"] is None for row in _rows(run)][:3],
        "train.generate_every": lambda run: (run / "log.txt").read_text().count("def "),
        "train.export_hf_every": lambda run: (run / "hf").exists(),
        "train.collect_garbage_every": lambda run: collected.count(run.name),
        "hardware.peak_flops_fp32": lambda run: _rows(run)[-1]["mfu"] is None,
    }
    assert not [key for key, look in seen.items() if look(run["base"]) == look(run["other"])]
    stopped: dict[str, Callable[[Path], object]] = {
        "train.stop_after": lambda run: len(_rows(run)),
        "train.generate_seconds": lambda run: "cut off after" in (run / "log.txt").read_text(),
        "train.callbacks": lambda run: collected.count(run.name),
        "train.export_hf_dtype": lambda run: "weight_scale_inv" in _exported(run),
        "profile.enabled": lambda run: any(path.name.startswith("profile") for path in run.iterdir()),
    }
    assert not [key for key, look in stopped.items() if look(run["base"]) == look(run["stopped"])]
    # checkpoint.load: the weights are those of the run, not of the seed.
    key = SchemaKey("checkpoint", "checkpoint.load", str)
    load = (f"checkpoint.load={run['base']}", "train.sequence_length=32")
    config = strict(composed(("data=text", f"data.path={commands.text}", *load)))
    assert weights(plan_job(config, [])) != weights(
        job_with(key, None, ("data=text", f"data.path={commands.text}", *load))
    )
    shown = {name for name, entry in EFFECTS.items() if isinstance(entry.observe, str)}
    elsewhere = {"inert", "null", "task", "run.resume", "model.path"}
    assert {name for name in shown if EFFECTS[name].observe not in elsewhere} == {*seen, *stopped}


def test_a_key_that_acts_nowhere_yet_is_told(files: dict[str, str]) -> None:
    inert = [key for key in KEYS if getattr(effect(key.schema, key.name), "observe", "") == "inert"]
    assert len(inert) >= 4
    for key in inert:
        found = effect(key.schema, key.name)
        assert found is not None
        beside = tuple(filled(o, files) for o in (*key.beside, *found.beside))
        assert why_inert(job_with(key, ..., beside), key.name)


NODES = ["tensor", "expert", "context", "pipeline"]


@pytest.mark.parametrize("node", NODES)
def test_a_wrapper_that_is_null_is_missed_where_its_degree_is_more_than_one(
    planned: PlannedCommand, node: str
) -> None:
    preset = {"context": "cp", "pipeline": "pp"}.get(node, "tp_ep")
    outcome = planned.run(f"parallel={preset}", f"parallel.{node}=null")
    assert (outcome.code, f"needs parallel.{node}" in outcome.err) == (2, True)


def test_run_resume_is_refused(planned: PlannedCommand) -> None:
    for value in ("true", "false"):
        outcome = planned.run(f"run.resume={value}")
        assert (outcome.code, "resume=RUN_DIR" in outcome.err) == (2, True)
