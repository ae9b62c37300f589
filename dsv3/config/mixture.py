"""Schema of `data=mixture`: sources by name, each with a weight and the keys of its own kind."""

import re
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Any, ClassVar, NamedTuple

from dsv3.config.data import DataConfig
from dsv3.config.registry import SCHEMAS, schema
from dsv3.errors import InvalidValue, UserError, did_you_mean, quoted, require

SOURCES = "data.sources"

MOST_SOURCES = 256
"""So many that blocks of 65,536 samples have exact counts (dsv3/data/mixture_order.py)."""

_OF_MIXTURE = ("document_mask", "cache_dir", "allow_change")
"""Keys of all data that only a mixture as a whole has; a source may differ in the others."""

_NAME = re.compile(r"[A-Za-z0-9_-]+")

Weights = list[tuple[int, Fraction]]
"""Weights by the tokens of training from which on they hold; the first from 0 on."""


class MixtureSource(NamedTuple):
    """A source as it was typed, checked."""

    name: str
    config: DataConfig
    weights: Weights


@schema("data/mixture")
@dataclass
class MixtureDataConfig(DataConfig):
    """Several sources, from which each batch takes its rows by their weights."""

    in_mixture: ClassVar[bool] = False

    _target_: str = "dsv3.data.mixture.MixtureData"
    sources: dict[str, Any] = field(default_factory=dict, metadata={"choices": "data"})
    """By name, {source: shards, weight: 0.7, path: ..}: a choice of data, its share, keys of that choice."""

    def validate(self) -> None:
        """Raise UserError for sources that cannot be read or weights that are none."""
        super().validate()
        self.read_choices()

    def read_choices(self) -> dict[str, DataConfig]:
        """Return the configs of the sources by dotted key, to be validated as any."""
        return {f"sources.{source.name}": source.config for source in read_sources(self)}


def read_sources(mixture: MixtureDataConfig) -> list[MixtureSource]:
    """Return the sources of a mixture, in the order of their names; what one does not say is the mixture's.

    Raises:
        UserError: a source has an unknown key or kind, or a value or weight that is not possible.
    """
    named = mixture.sources
    example = "data.sources={web:{path:DIR,weight:0.7},code:{path:DIR,weight:0.3}}"
    allowed = f"name 1 to {MOST_SOURCES}, '{example}'"
    require(0 < len(named) <= MOST_SOURCES, "sources", f"{len(named)} sources", allowed)
    found = []
    for name, node in sorted(named.items()):
        if not _NAME.fullmatch(str(name)):
            raise UserError(f"{SOURCES}.{name}: a name has letters, digits, _ and - alone")
        if not isinstance(node, dict):
            raise UserError(f"{SOURCES}.{name}={quoted(node)} is no source: give its keys, '{example}'")
        found.append(
            MixtureSource(str(name), _read_config(mixture, f"{SOURCES}.{name}", node), _weights(name, node))
        )
    for tokens in sorted({start for source in found for start, _ in source.weights}):
        if not any(weight_at(source.weights, tokens) for source in found):
            raise UserError(
                f"{SOURCES}: every weight is 0 from token {tokens:,} on: give one a weight above 0"
            )
    return found


def weight_at(weights: Weights, tokens: int) -> Fraction:
    """Return the weight that holds after so many tokens of training."""
    return next(weight for start, weight in reversed(weights) if start <= tokens)


def _read_config(mixture: MixtureDataConfig, path: str, node: dict[str, Any]) -> DataConfig:
    """Return the config of one source: its own keys over those that it has in common with the mixture."""
    from omegaconf import OmegaConf  # what imports this file for its schema does without
    from omegaconf.errors import OmegaConfBaseException

    from dsv3.config.strict import escape_interpolation, plain_reason

    kinds = _kinds()
    kind = str(node.get("source", "shards"))
    if kind not in kinds:
        close = did_you_mean(kind, list(kinds))
        raise UserError(
            f"{path}.source={kind} is no source of a mixture.{close} Possible: {', '.join(kinds)}"
        )
    own = {key: value for key, value in node.items() if key not in ("source", "weight")}
    known = [f.name for f in fields(kinds[kind]) if not f.name.startswith("_") and f.name not in _OF_MIXTURE]
    for key in own:
        if key in _OF_MIXTURE:
            raise UserError(f"{path}.{key}: the whole mixture has one, data.{key}=VALUE")
        if key not in known:
            told = ", ".join(["source", "weight", *known])
            close = did_you_mean(key, ["source", "weight", *known], f"{path}.")
            having = [f"source: {other}" for other, schema in kinds.items() if key in _names(schema)]
            has = f" {' and '.join(having[:3])} has it." if having else close
            raise UserError(f"unknown key '{path}.{key}' of source: {kind}.{has} Known here: {told}")
    shared = {
        f.name: getattr(mixture, f.name) for f in fields(DataConfig) if f.name in {*_names(kinds[kind])}
    }
    try:
        merged = OmegaConf.merge(OmegaConf.structured(kinds[kind]), escape_interpolation(shared | own))
        config: DataConfig = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        key = str(error.full_key or "")
        reason = plain_reason(str(error.msg or error).splitlines()[0], f"{path}.{key}")
        if key not in own:  # one that it has from the mixture
            raise UserError(f"{path}: {reason}") from None
        raise UserError(f"{path}.{key}={quoted(own[key])} is not possible: {reason}") from None
    return config


def _kinds() -> dict[str, type[DataConfig]]:
    """Return the choices of `data` that can be sources, by name."""
    found = {name.partition("/")[2]: schema for name, schema in SCHEMAS.items() if name.startswith("data/")}
    return {name: found[name] for name in sorted(found) if found[name].in_mixture}


def _names(schema: type[DataConfig]) -> list[str]:
    return [f.name for f in fields(schema) if not f.name.startswith("_")]


def _weights(name: str, node: dict[str, Any]) -> Weights:
    """Return a source's weights by the token from which on they hold."""
    key, value = f"{SOURCES}.{name}.weight", node.get("weight")
    allowed = (
        "must be a number from 0 on, or pairs such as [[0,0.7],[1e12,0.5]]: from that token on that weight"
    )
    if value is None:
        raise UserError(
            f"{key} is missing: give the source's share, such as 0.7; shares are taken over their sum"
        )
    pairs = value if isinstance(value, list) else [[0, value]]
    if not all(isinstance(pair, list) and len(pair) == 2 and all(map(_is_number, pair)) for pair in pairs):
        raise InvalidValue(f"sources.{name}.weight", value, allowed)
    starts = [start for start, _ in pairs]
    if (
        not pairs
        or starts[0] != 0
        or any(start != int(start) for start in starts)
        or starts != sorted({*starts})
    ):
        begins = "the first pair begins at token 0, and the tokens of the others are whole numbers that grow"
        raise InvalidValue(f"sources.{name}.weight", value, begins)
    if any(weight < 0 for _, weight in pairs):
        raise InvalidValue(f"sources.{name}.weight", value, allowed)
    # The decimal number that was typed, not the binary one beside it: 0.1 + 0.2 is 0.3.
    return [(int(start), Fraction(repr(weight))) for start, weight in pairs]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63
