"""A run on data=mixture from end to end: its metrics by source, a resume in the middle, and task=evaluate."""

import json
from pathlib import Path

import pytest

from tests.harness.commands import TrainCommand
from tests.harness.runs import rows, write_texts
from tests.harness.tiny import MODEL, TRAINING

pytestmark = pytest.mark.slow


def test_a_run_on_a_mixture_tells_its_sources_resumes_exactly_and_is_evaluated_by_source(
    commands: TrainCommand, tmp_path: Path
) -> None:
    code = tmp_path / "code"
    code.mkdir()
    write_texts(code, 30, 40)
    sources = (
        f"data.sources={{web:{{source:text,path:{commands.text},weight:[[0,0.5],[256,1]]}},"
        f"code:{{source:text,path:{code},weight:0.5,packing:best_fit,fim_rate:0.4}}}}"
    )
    settings = [*MODEL, *TRAINING, "data=mixture", sources, "train.steps=4", "train.evaluate_every=2"]
    settings += ["train.log_every=1", "train.checkpoint_every=2"]
    straight, halted = tmp_path / "straight", tmp_path / "halted"
    shown = commands.must(*settings, f"run.dir={straight}").out
    written = rows(straight)
    for row in written:
        assert row["sources"].keys() == {"code", "web"}
        assert sum(source["tokens"] for source in row["sources"].values()) == row["tokens"]
        has_loss = [source["evaluation_loss"] is not None for source in row["sources"].values()]
        assert has_loss == [row["step"] % 2 == 0] * 2
    # 8 samples of the first stage are 4 of each source.
    assert [source["tokens"] for source in written[1]["sources"].values()] == [4 * 32, 4 * 32]
    losses = {name: source["evaluation_loss"] for name, source in written[-1]["sources"].items()}
    for name, loss in losses.items():
        assert f"{name:<6}held-out {loss:.4f}".split() in [line.split()[:3] for line in shown.splitlines()]
    told = (straight / "this_run.txt").read_text()
    for words in ("code: ", "web: ", "documents in the form of fill-in-the-middle", "of the rows is padding"):
        assert words in told

    commands.must(*settings, f"run.dir={halted}", "train.stop_after=2")
    commands.must(f"resume={halted}")
    assert rows(halted) == written

    outcome = commands.must("task=evaluate", f"checkpoint.load={straight}")
    found = json.loads(outcome.out.splitlines()[-1])
    assert found["loss"] == written[-1]["evaluation_loss"]
    assert {name: source["loss"] for name, source in found["sources"].items()} == losses
    assert found["tokens"] == sum(source["tokens"] for source in found["sources"].values())
    for name, source in found["sources"].items():
        assert f"{source['loss']:,.4f} on {source['tokens']:,} tokens" in outcome.err
        assert f"  {name} " in outcome.err
