"""docs/clients.md shows what benchmarks/clients.py measured, and a client's wrong answers are counted."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.client_process import NAMED
from benchmarks.client_questions import Asked
from benchmarks.clients import RESULT, compare, table
from tests.harness.processes import ROOT

PAGE = (ROOT / "docs" / "clients.md").read_text()
RESULTS = json.loads(RESULT.read_text())


def test_the_page_shows_the_stored_results_and_the_converter_as_it_was_run() -> None:
    shown = PAGE.split("<!-- clients: begin -->\n")[1].split("\n<!-- clients: end -->")[0]
    assert shown.splitlines() == table(RESULTS)
    assert NAMED.strip() in PAGE


@pytest.mark.parametrize("export", RESULTS["exports"])
def test_every_client_was_run_on_every_export_and_no_path_of_a_machine_is_stored(export: str) -> None:
    names = " ".join(RESULTS["exports"][export])
    assert all(name in names for name in ("dsv3", "transformers 5", "transformers 4", "lm-eval", "llama.cpp"))
    assert not any(place in json.dumps(RESULTS["exports"][export]) for place in ("/tmp", "/home", "/root"))


IDS = {"ids": [5, 6, 7], "text": "abc", "stopped": True}
ASKED = Asked(Path(), {}, 2.0, 2.0, {}, [], [[1], [2, 3]], [[0, 1]], [IDS, IDS], "chat")
RIGHT = {"losses": [1.5, 2.5], "token_ids": [[1], [2, 3]], "prompt_ids": [[0, 1]], "greedy": [IDS, IDS]}


@pytest.mark.parametrize(
    ("answer", "where", "equal"),
    [
        ({}, ("greedy",), 6),
        ({"greedy": [IDS, IDS | {"ids": [5, 9, 7]}]}, ("greedy",), 5),
        ({"greedy": [IDS, IDS | {"ids": [5, 6, 7, 8]}]}, ("greedy",), 6),  # of 7
        ({"greedy": [IDS, IDS | {"text": "ab"}]}, ("greedy", "text"), 1),
        ({"greedy": [IDS, IDS | {"stopped": False}]}, ("greedy", "stopped"), 1),
        ({"token_ids": [[1], [2]]}, ("token_ids",), 1),
        ({"prompt_ids": [[1]]}, ("prompt_ids",), 0),
        ({"chat": "cha"}, ("chat",), 0),
    ],
)
def test_an_answer_that_is_not_that_of_dsv3_is_not_counted(
    answer: dict[str, Any], where: tuple[str, ...], equal: int
) -> None:
    found = compare(ASKED, RIGHT | answer)
    assert found["losses"]["difference"] == 0
    for name in where:
        found = found[name]
    assert found["equal"] == equal
    assert found["of"] >= equal
    assert (found["of"] == equal) == (not answer)


def test_an_error_of_a_client_is_an_answer() -> None:
    assert compare(ASKED, RIGHT | {"greedy": {"error": "no"}})["greedy"] == {"error": "no"}
    assert compare(ASKED, {"load": {"error": "no"}}) == {"load": {"error": "no"}}
