"""The held-out data of a run: all that decides which tokens its held-out loss is the mean of.

Losses are comparable where all of it is equal. task=evaluate compares with the run that trained its
checkpoint, task=compare the runs of a directory with one another.
"""

from collections.abc import Mapping
from typing import Any

from dsv3.config.convergence import flatten, shown
from dsv3.config.data import ROW_ORDER
from dsv3.config.registry import SCHEMAS
from dsv3.config.training import scored_rows

EVERY_ROW = "every row"
"""In place of a held-out share where a whole table of ids is scored."""

HeldOutData = Mapping[str, tuple[Any, Any]]
"""By key, a value as exact as the run's files tell it, and one that every run tells; None: unknown."""


def held_out_data(
    config: Mapping[str, Any],
    data_fingerprint: str | None,
    tokenizer_fingerprint: str | None,
    held_out_rows: int | None = None,
    scored: int | None = None,
    row_order: int = ROW_ORDER,
) -> HeldOutData:
    """Return the held-out data of a run by its stored or plain config.

    `held_out_rows` are those that it could score; `scored` those that a run of older code has scored, the
    first ones. None: unknown. `row_order` is that of the code that trained.
    """
    data, tokenizer, train = (_node(config, name) for name in ("data", "tokenizer", "train"))
    tokens = train.get("evaluate_tokens", 0) if train else 0
    rows = None if scored is None else f"the first {scored} rows"
    if tokens and held_out_rows is not None and train.get("sequence_length"):
        count = scored_rows(held_out_rows, train["sequence_length"], tokens)
        rows = "all" if count == held_out_rows else f"{count} rows"
    is_older = "sequence_length" in train and "evaluate_tokens" not in train
    of_older_code = "some of the first rows" if is_older else None
    place = data.get("path") or data.get("dataset")
    source = data and f"{choice_name('data', data.get('_target_'))}{f' {place}' if place else ''}"
    trained = {key: value for key, value in flatten(tokenizer).items() if not key.startswith("_")}
    kind = choice_name("tokenizer", tokenizer.get("_target_"))
    named = tokenizer and " ".join([kind, *(f"{key}={shown(value)}" for key, value in trained.items())])
    length, mask, share = train.get("sequence_length"), data.get("document_mask"), data.get("held_out")
    return {
        "data": (data_fingerprint, source or None),
        "data.held_out": (share, share),
        "tokenizer": (tokenizer_fingerprint, named or None),
        "train.sequence_length": (length, length),
        "data.document_mask": (mask, mask),
        "train.evaluate_tokens": (
            ("all", "all") if tokens is None else (rows or of_older_code, tokens or of_older_code)
        ),
        "order of rows": (row_order, row_order) if reads_table(config) else (None, None),
    }


def reads_table(config: Mapping[str, Any]) -> bool:
    """Return True for a stored config whose data is a table of token ids."""
    return choice_name("data", _node(config, "data").get("_target_")) == "tokens"


def differing(runs: Mapping[str, HeldOutData]) -> dict[str, dict[str, Any]]:
    """Return the values by run of each key on which the held-out data of named runs differ.

    A value that is unknown differs from nothing.
    """
    found = {}
    for key in next(iter(runs.values()), {}):
        exact, told = ({name: data[key][level] for name, data in runs.items()} for level in (0, 1))
        values = exact if None not in exact.values() else told
        known = {name: value for name, value in values.items() if value is not None}
        if len({shown(value) for value in known.values()}) > 1:
            found[key] = known
    return found


def precision_choice(config: Mapping[str, Any]) -> str | None:
    """Return the choice of `precision` that a stored config computes in, None where it does not say."""
    precision = _node(config, "precision")
    return "fp8" if precision.get("fp8") else precision.get("compute")


def choice_name(group: str, target: Any) -> str:
    """Return the name of the choice that builds the class `target`, or the class itself."""
    names = (name for name, schema in SCHEMAS.items() if getattr(schema, "_target_", None) == target)
    found = next((name for name in names if name.startswith(f"{group}/")), None)
    return found.partition("/")[2] if found else str(target)


def _node(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a node of a stored config, empty where it is none."""
    node = config.get(name)
    return node if isinstance(node, dict) else {}
