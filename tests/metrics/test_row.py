import json
from dataclasses import fields

import pytest

from dsv3.metrics.row import MetricsRow

CONTRACT = """
step loss mtp_loss balance_loss grad_norm lr tokens tokens_per_second mfu memory_gib evaluation_loss
moe_max_violation moe_entropy moe_bias_range
"""


def test_fields_are_those_of_the_contract_in_its_order_and_more() -> None:
    more = ["fp8_broken_tiles", "data_wait", "straggler", "straggler_rank", "skipped", "alarm"]
    more += ["padding", "planned_tokens_per_second", "planned_memory_gib", "sources"]
    assert [field.name for field in fields(MetricsRow)][: 14 + len(more)] == [*CONTRACT.split(), *more]
    written = json.loads(MetricsRow(step=1, tokens=2).to_json())
    assert list(written) == [field.name for field in fields(MetricsRow)]


def test_what_is_not_finite_is_written_as_null() -> None:
    row = MetricsRow(step=1, tokens=2, loss=float("nan"), grad_norm=float("inf"), lr=-float("inf"), mfu=0.5)
    written = json.loads(row.to_json())
    assert (written["loss"], written["grad_norm"], written["lr"], written["mfu"]) == (None, None, None, 0.5)
    assert row.scalars() == {"tokens": 2, "mfu": 0.5}


def test_the_values_of_sources_are_written_by_source_and_drawn_by_their_path() -> None:
    web: dict[str, float | None] = {"tokens": 10, "epochs": 0.5, "evaluation_loss": 3.0}
    code: dict[str, float | None] = {"tokens": 20, "epochs": 1.5, "evaluation_loss": float("nan")}
    row = MetricsRow(step=1, tokens=30, sources={"web": web, "code": code})
    written = json.loads(row.to_json())
    assert written["sources"] == {"web": web, "code": code | {"evaluation_loss": None}}
    assert type(written["sources"]["web"]["tokens"]) is int
    assert row.scalars() == {
        "tokens": 30,
        "sources/web/tokens": 10,
        "sources/web/epochs": 0.5,
        "sources/web/evaluation_loss": 3.0,
        "sources/code/tokens": 20,
        "sources/code/epochs": 1.5,
    }
    assert MetricsRow.from_json(row.to_json()).sources == written["sources"]
    assert json.loads(MetricsRow(step=1, tokens=2).to_json())["sources"] is None


def test_a_row_survives_the_way_through_json() -> None:
    row = MetricsRow(step=3, tokens=6, loss=1.25, evaluation_loss=2.5)
    assert MetricsRow.from_json(row.to_json()) == row


def test_unknown_fields_are_passed_over_and_missing_ones_are_none() -> None:
    assert MetricsRow.from_json('{"step": 1, "tokens": 2, "novel": 3}') == MetricsRow(step=1, tokens=2)


@pytest.mark.parametrize("line", ["", "3", '{"step": 1', '{"step": 1}', '{"step": 1.5, "tokens": 2}'])
def test_what_is_no_row_is_refused(line: str) -> None:
    with pytest.raises(ValueError):
        MetricsRow.from_json(line)
