"""benchmarks/gpu.py: the steps' limits, failures and results, without a GPU and on the simulated one."""

import json
import sys
import time
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.gpu import (
    BARS,
    CheckFailed,
    Outcome,
    Runner,
    Step,
    chosen_steps,
    figures,
    learns,
    repeats,
    run_steps,
    slice_of,
    summary,
    waits_as_simulated,
)
from tests.cuda.library import obstacle

WRITES = (
    "import json, pathlib; pathlib.Path('{own}/figures.json').write_text(json.dumps(dict(first_loss=2.0)))"
)


def run(steps: list[Step], out: Path, seconds: float = 60.0, missing: tuple[str, ...] = ()) -> list[Outcome]:
    return list(run_steps(steps, Runner(out), missing, time.monotonic() + seconds))


def code(text: str) -> list[str]:
    """A command of Python; braces are for the folders."""
    return ["-c", text]


def test_a_step_that_fails_or_hangs_leaves_the_others(tmp_path: Path) -> None:
    child = f"import time; open(r'{tmp_path}/began', 'w'); time.sleep(600)"
    found = run(
        [
            Step("fails", "", 30, [code("print('some reason'); raise SystemExit(3)"), code("1")]),
            Step("hangs", "", 0.7, [code(child)]),
            Step("no figures", "", 30, [code("1")], figures),
            Step("lacks", "", 30, [code("1")], needs=("deep_ep",)),
            Step(
                "works",
                "",
                30,
                [code("1".replace("1", WRITES.replace("dict(first_loss=2.0)", "[]"))), code("1")],
            ),
        ],
        tmp_path,
        missing=("deep_ep",),
    )
    assert [one.status for one in found] == ["failed", "timed out", "failed", "skipped", "ok"]
    assert found[0].reason == "exit code 3: some reason"
    assert "FileNotFoundError" in found[2].reason
    assert (tmp_path / "began").exists()
    assert (tmp_path / "fails.log").read_text() == "some reason\n"


def test_what_a_hanging_step_has_started_ends_with_it(tmp_path: Path) -> None:
    beats = tmp_path / "beats"
    child = f"import time\nwhile True: open(r'{beats}', 'a').write('.'); time.sleep(0.02)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    (outcome,) = run([Step("hangs", "", 1.0, [code(parent)])], tmp_path)
    assert outcome.status == "timed out"
    length = beats.stat().st_size
    assert length
    time.sleep(0.2)
    assert beats.stat().st_size == length


def test_the_budget_ends_the_check_and_cuts_the_last_limit(tmp_path: Path) -> None:
    steps = [Step("long", "", 500, [code("import time; time.sleep(600)")]), Step("late", "", 60, [code("1")])]
    late = run(steps[1:], tmp_path, seconds=5)
    assert (late[0].status, late[0].reason) == ("no time left", "--steps late runs it alone")
    before = gpu.LEAST_SECONDS
    gpu.LEAST_SECONDS = 0.5
    try:
        cut, none = run(steps, tmp_path, seconds=0.8)
    finally:
        gpu.LEAST_SECONDS = before
    assert (cut.status, none.status) == ("timed out", "no time left")


def rows(folder: Path, losses: list[float], first: int = 1) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {
            "step": first + n,
            "loss": loss,
            "grad_norm": 1.0,
            "tokens_per_second": 10.0 * (n + 1),
            "memory_gib": n,
        }
        for n, loss in enumerate(losses)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_run_must_take_its_steps_and_learn(tmp_path: Path) -> None:
    own = tmp_path / "step"
    rows(tmp_path / "a", [3.0, 2.5, 2.0])
    told = {"first_loss": 3.0, "last_loss": 2.0, "tokens_per_second": 20.0, "memory_gib": 2}
    assert learns("a", 3)(own) == told
    for losses, first, steps in (
        ([3.0, 2.0], 1, 3),
        ([2.0, 3.0], 1, 2),
        ([3.0, float("nan")], 1, 2),
        ([3.0, 2.0], 2, 2),
    ):
        rows(tmp_path / "a", losses, first)
        with pytest.raises(CheckFailed):
            learns("a", steps)(own)


def test_deterministic_runs_must_be_equal(tmp_path: Path) -> None:
    for number, losses in ((1, [3.0, 2.0]), (2, [3.0, 2.0])):
        rows(tmp_path / f"deterministic{number}", losses)
    assert repeats(tmp_path / "step") == {"losses": [3.0, 2.0]}
    rows(tmp_path / "deterministic2", [3.0, 2.0000001])
    with pytest.raises(CheckFailed):
        repeats(tmp_path / "step")


def test_a_wait_that_the_simulation_does_not_know_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = tmp_path / "golden.json"
    golden.write_text(json.dumps({"bf16": {"model/a.py A.f: item": 1}}))
    monkeypatch.setattr(gpu, "HOST_WAITS", golden)
    for place, known in (("model/a.py A.f", True), ("model/a.py A.g", False)):
        (tmp_path / "figures.json").write_text(json.dumps({"waits": {place: 2}}))
        if known:
            assert waits_as_simulated(tmp_path)["waits"] == {place: 2}
        else:
            with pytest.raises(CheckFailed, match=r"A\.g"):
                waits_as_simulated(tmp_path)


def test_steps_are_chosen_by_name_with_what_they_follow() -> None:
    assert [step.name for step in chosen_steps("slice_bf16, resume")] == [
        "debug_bf16",
        "resume",
        "slice_bf16",
    ]
    assert len(chosen_steps(None)) == len(gpu.STEPS)
    with pytest.raises(ArgumentTypeError, match="there are tests, debug_bf16"):
        chosen_steps("slice")


def test_every_file_that_a_step_names_is_there() -> None:
    for step in gpu.STEPS:
        for command in step.commands:
            for part in command:
                assert not part.endswith(".py") or (gpu.ROOT / part).exists(), part
    assert sum(step.seconds for step in gpu.STEPS[:6]) < 570


@pytest.mark.slow
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert gpu.main(["--json", str(tmp_path / "none.json")]) == 0
    assert capsys.readouterr().out.startswith("no CUDA GPU here (torch ")
    assert not (tmp_path / "none.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(bool(obstacle()), reason=str(obstacle()))
def test_on_a_simulated_gpu_results_carry_hardware_versions_and_the_bars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = ("--model", "debug", "--layers", "2", "--length", "32", "--microbatch", "1", "--steps", "1")
    steps = [
        Step("slice", "", 120, [slice_of(*tiny, "--matmul-size", "64", "hardware=h200")], figures),
        Step("fails", "", 60, [["tests/cuda/none.py"]]),
    ]
    monkeypatch.setattr(gpu, "STEPS", steps)
    simulated = f"{sys.executable} -m tests.cuda.simulate"
    target = tmp_path / "result.json"
    assert gpu.main(["--launcher", simulated, "--out", str(tmp_path / "out"), "--json", str(target)]) == 1
    told: dict[str, Any] = json.loads(target.read_text())
    assert told["gpu"] == "NVIDIA H200 (simulated)"
    assert {"torch", "cuda", "cudnn"} <= told["versions"].keys()
    assert told["date"]
    assert [step["status"] for step in told["steps"]] == ["ok", "failed"], told["steps"]
    found = told["steps"][0]["figures"]
    assert set(found["mfu"]) == {"causal", "full_square"}
    assert found["mfu_of"] == "bf16 data-sheet peak of h200"
    assert min(found["planned_gib"], found["peak_gib"], found["tokens_per_second"], found["tflops"]) > 0
    shown = capsys.readouterr().out
    assert "slice: MFU" in shown
    assert all(f"to beat: {mfu:.1%}" in shown for mfu in BARS.values())


def test_the_summary_counts_what_became_of_the_steps() -> None:
    outcomes = [Outcome("a", "ok"), Outcome("b", "ok"), Outcome("c", "timed out")]
    assert summary(outcomes)[0] == "2 ok, 1 timed out"
