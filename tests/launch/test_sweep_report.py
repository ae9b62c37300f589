"""The end of a sweep: one JSON line or one row per plan, and rankings of what was trained or evaluated."""

import contextlib
import json
import shlex
from pathlib import Path

import pytest

from dsv3.launch.job import SweepJob
from dsv3.launch.sweep import Sweep, record_result
from dsv3.launch.sweep_report import reported
from dsv3.planning.step_time import Cause
from tests.harness.commands import TrainCommand
from tests.harness.tiny import MODEL, TRAINING

PLANS = ("-m", "task=plan", "model=671b", "hardware=h800", "parallel=pp,tp_ep", "launch.world_size=100,2048")


def test_a_stopped_sweep_names_the_jobs_that_were_not_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sweep = Sweep(tmp_path, arguments=["-m", "optimizer.lr=1e-3,2e-3,3e-3,4e-3", "train.steps=2"])
    basic = {"_target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"}
    sweep.job(1, ["optimizer.lr=2e-3", "train.steps=2"], basic, tmp_path / "1")
    with contextlib.suppress(KeyboardInterrupt), reported(sweep):
        raise KeyboardInterrupt
    assert f"jobs 2 to 3 of {tmp_path} were not run\n" in capsys.readouterr().err


def words(line: str) -> str:
    return " ".join(line.split())


def test_a_sweep_of_plans_prints_one_json_line_per_job(commands: TrainCommand) -> None:
    outcome = commands.run(*PLANS, "task.format=json", "train.steps=1e3")
    assert outcome.code == 1  # 100 ranks are no layout
    jobs = [json.loads(line) for line in outcome.out.splitlines()]
    assert [job["job"] for job in jobs] == [0, 1, 2, 3]
    single = json.loads(
        commands.must(
            *("task=plan", "task.format=json", "model=671b", "hardware=h800"),
            *("parallel=tp_ep", "launch.world_size=2048", "train.steps=1e3"),
        ).out
    )
    named = {
        "job": 3,
        "overrides": {
            "model": "671b",
            "hardware": "h800",
            "parallel": "tp_ep",
            "launch.world_size": "2048",
            "train.steps": "1000",
        },
        "model": "671b",
        "parallel": "tp_ep",
        "hardware": "h800",
        "precision": "bf16",
    }
    assert jobs[3] == named | single
    assert "leaves no whole dp_shard of a world of 100 ranks" in jobs[0]["error"]
    assert jobs[0]["overrides"]["launch.world_size"] == "100"
    assert {"model": "671b", "parallel": "pp", "hardware": "h800"}.items() <= jobs[0].items()
    headings = [line for line in outcome.err.splitlines() if line.startswith("job 2 (3 of 4): ")]
    (directory,) = Path("multirun").iterdir()
    assert headings == [f"job 2 (3 of 4): parallel=tp_ep launch.world_size=100 -> {directory}/2"]


def test_plans_in_order_of_their_use(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Those that fit by their speed, then what may fit, what does not, and what was refused."""

    def plan(fits: bool | None, speed: float) -> dict[str, object]:
        sizes = {"memory_bytes": {"total": 2**30}, "device_memory_bytes": None, "mfu": None, "bubble": 0.125}
        causes = {"matmuls": 3.0, "ep": 5.0, "optimizer": 2.0}
        time = {"seconds": 10.0, "causes": causes}
        return {**sizes, "fits": fits, "tokens_per_second_per_gpu": speed, "time": time}

    plans = [plan(True, 100.0), plan(False, 900.0), plan(None, 800.0), plan(True, 700.0)]
    sweep = Sweep(tmp_path, arguments=["-m", "task=plan"])
    for number, each in enumerate(plans):
        record_result(tmp_path / str(number), {"task": "plan", "differs": [f"a={number}"], "plan": each})
    refused = {"task": "plan", "differs": ["a=4"], "reason": "no layout\nof 4 ranks"}
    record_result(tmp_path / "4", refused)
    with reported(sweep):
        pass
    titles, *rows = map(words, capsys.readouterr().out.splitlines())
    assert titles.startswith("job overrides fits")
    assert rows == [
        "3 a=3 yes 1.00 - 700 - 12.5% exposed all-to-all 50%",
        "0 a=0 yes 1.00 - 100 - 12.5% exposed all-to-all 50%",
        "2 a=2 unknown 1.00 - 800 - 12.5% exposed all-to-all 50%",
        "1 a=1 no 1.00 - 900 - 12.5% exposed all-to-all 50%",
        "4 a=4 refused - - - - - no layout of 4 ranks",
    ]


def test_a_sweep_of_plans_is_one_table(commands: TrainCommand) -> None:
    few = ("-m", "task=plan", "model=671b", "hardware=h800", "parallel=pp", "launch.world_size=100,2048")
    recompute = "recompute=full,selective,none"
    titles, *rows = map(words, commands.run(*few, recompute, "precision=fp8").out.splitlines())
    named = "job overrides fits GiB per rank device GiB tokens/s per GPU mfu bubble largest cause"
    assert titles == named
    # What fits comes first, then what does not, the fastest before the others, then what is refused.
    assert [row.split()[:4] for row in rows] == [
        ["3", "launch.world_size=2048", "recompute=full", "yes"],
        ["5", "launch.world_size=2048", "recompute=none", "no"],
        ["4", "launch.world_size=2048", "recompute=selective", "no"],
        ["0", "launch.world_size=100", "recompute=full", "refused"],
        ["1", "launch.world_size=100", "recompute=selective", "refused"],
        ["2", "launch.world_size=100", "recompute=none", "refused"],
    ]
    reason = (
        "parallel.degrees: pp=16 x dp_replicate=1 x cp=1 x tp=1 leaves no whole dp_shard of a world of 100"
    )
    assert all(row.split(" refused - - - - - ")[1].startswith(reason) for row in rows[3:])
    (left,) = Path("multirun").glob("*/3/result.json")
    plan = json.loads(left.read_text())["plan"]
    cause, seconds = max(plan["time"]["causes"].items(), key=lambda cause: cause[1])
    cells = [
        *("3 launch.world_size=2048 recompute=full yes", f"{plan['memory_bytes']['total'] / 2**30:,.2f}"),
        "74.51",
        *(f"{plan['tokens_per_second_per_gpu']:,.0f}", f"{plan['mfu']:.1%}", f"{plan['bubble']:.1%}"),
        f"{Cause[cause].value} {seconds / plan['time']['seconds']:.0%}",
    ]
    assert rows[0] == " ".join(cells)


def test_a_sweep_ends_with_its_ranking_and_the_command_that_compares(commands: TrainCommand) -> None:
    never = ["train.generate_every=0", "train.checkpoint_every=0", "train.evaluate_every=1000"]
    settings = [*MODEL, "model.mtp_depths=0", *TRAINING, *never, "data=text", f"data.path={commands.text}"]
    swept = commands.run("-m", *settings, "train.steps=0,1,4", "run.dir=a sweep", "schedule.warmup_steps=0")
    assert swept.code == 1
    *_, title, titles, best, second, failed, _, _, compare = swept.out.splitlines()
    assert title == "Jobs of a sweep"
    assert words(titles).startswith("job overrides held-out loss")
    assert best.split()[:2] == ["2", "train.steps=4"]
    assert second.split()[:2] == ["1", "train.steps=1"]
    assert words(failed).startswith("0 train.steps=0 - - 0/? - failed")
    assert "job 0: train.steps=0 is not possible" in swept.err
    typed = shlex.split(compare)
    assert typed[-2:] == ["task=compare", "task.runs=a sweep"]
    printed = commands.must(*typed[2:]).out.splitlines()
    assert words(printed[1]) == words(best)
    assert "job 1 (2 of 3): train.steps=1 -> a sweep/1" in swept.out

    evaluated = commands.run(
        "-m", "task=evaluate", "checkpoint.load='a sweep/1','a sweep/2',none", "run.dir=told"
    )
    assert evaluated.code == 1
    assert len([json.loads(line) for line in evaluated.out.splitlines()]) == 2
    table = evaluated.err[evaluated.err.index("perplexity  state") :].splitlines()[1:4]
    assert [words(row).split()[0] for row in table] == ["1", "0", "2"]
    assert [words(row).split()[-1] for row in table] == ["done", "done", "failed"]
    assert "do not rank" not in evaluated.err

    lengths = ["checkpoint.load=a sweep/1", "train.sequence_length=16,32", "run.dir=lengths"]
    assert "train.sequence_length" not in (others := commands.must("-m", "task=evaluate", *lengths)).out
    assert "data differ: train.sequence_length is 16 in 0, 32 in 1" in others.err


@pytest.mark.parametrize(
    ("arguments", "params", "total", "constant"),
    [
        (["a=1,2,3", "b=1,2", "c=4"], {}, 6, "c=4"),
        (["a=range(1,4)"], {"b": "choice(1,2)", "c": 4}, 6, "c=4"),
        (["model=glob(*b)", "a=1"], {}, 4, "a=1"),
        (["a=1"], {"a": "1,2", "b": "1,2,3"}, 3, "a=1"),
        (["a=1,2"], {"a": "1,2,3", "c": 4}, 2, "c=4"),
    ],
)
def test_the_jobs_are_counted_and_what_they_share_is_left_out(
    arguments: list[str], params: dict[str, object], total: int, constant: str
) -> None:
    sweeper = {"_target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper", "params": params}
    job = Sweep(arguments=["-m", *arguments]).job(1, ["x=1", constant], sweeper, Path("multirun/now/1"))
    assert (job.place, job.total, job.differs) == (2, total, ["x=1"])
    assert job.heading == f"job 1 (2 of {total}): x=1 -> multirun/now/1"


def test_a_job_is_named_by_the_last_words_of_the_keys_that_differ() -> None:
    def name(*differs: str) -> str:
        return SweepJob("0", 1, None, list(differs), Path()).short_name

    assert name("optimizer.lr=1e-3", "model.moe.top_k=2") == "lr=1e-3 top_k=2"
    clash = ["model.moe.hidden_dim=1", "model.dense.hidden_dim=2"]
    assert name(*clash) == " ".join(clash)
