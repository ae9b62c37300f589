"""A plan that does not fit names changes that do: each is typed again here, and must fit."""

import re
from dataclasses import replace

import pytest

from dsv3.planning import hardware
from dsv3.planning.hardware import named_hardware
from dsv3.planning.report import format_plan
from tests.harness.commands import PlannedCommand
from tests.planning.plans import plan_16b

GIB = 2**30


@pytest.fixture(autouse=True)
def _laptop(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, and 24 GiB for all ranks."""
    monkeypatch.setattr(hardware, "QUERY", ["false"])
    for module in ("dsv3.planning.hardware", "dsv3.launch.nearest_fix"):
        monkeypatch.setattr(f"{module}.host_memory", lambda *_: 24 * GIB)


def refused(planned: PlannedCommand, *arguments: str) -> tuple[str, str]:
    """Return the two lines of a run that does not fit."""
    outcome = planned.run(*arguments)
    assert (outcome.code, outcome.jobs) == (2, [])
    need, fix = outcome.err.strip().splitlines()[-2:]
    assert need.startswith("error: ")
    return need, fix


def typed_again(fix: str, arguments: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return the commands that a fix stands for."""
    plans = re.findall(r"task=plan (\S+(?: \S+=\S+)*)", fix)
    if plans:
        return [(*arguments, "task=plan", *plan.split()) for plan in plans]
    world = re.search(r"launch.nproc x launch.nnodes = ([\d,]+) ranks", fix)
    ranks = (f"launch.nproc={world[1].replace(',', '')}",) if world else ()
    keys = re.findall(r"(?:^|and )([a-z_.]+=\S+)(?= |,|$)", fix.partition(", with")[0])
    assert keys
    return [(*arguments, *(key.rstrip(",") for key in keys), *ranks)]


MUCH = "hardware.memory_bytes=80000000000"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("model=671b", "parallel=tp_ep"), "task=plan hardware=h100 .* and task=plan hardware=h200 .* fit"),
        (
            ("model=671b", "parallel=tp_ep", "train.global_batch_size=64"),
            "dp_shard=128 train.global_batch_size=128 launch.world_size=512 and .*=256 fit$",
        ),
        (("model=671b",), "nothing fits into the 24.0 GiB that the ranks of this machine share; .*fsdp"),
        (("model=16b", "parallel=fsdp"), "hardware=h100 launch.world_size=8 and"),
        (("model=671b", "hardware=h100", "parallel=pp"), "^recompute=full fits on the same ranks$"),
        (("model=16b", MUCH), r"^parallel=fsdp and .*parallel.degrees.dp_shard=(\d+) fit, with .* \1 ranks$"),
        (
            ("model=16b", MUCH, "parallel=fsdp", "train.microbatch_size=64", "train.global_batch_size=512"),
            "=false and recompute=full and train.microbatch_size=1?[68] fit on the same ranks$",
        ),
        (
            ("model=16b", MUCH, "parallel=fsdp", "train.global_batch_size=4", "launch.nproc=2"),
            r"parallel.degrees.dp_shard=(\d+) and train.global_batch_size=\1 fit, with .* \1 ranks$",
        ),
        (
            ("model=16b", MUCH, "parallel=fsdp", "train.sequence_length=524288", "recompute=full"),
            "parallel.degrees.cp=8 fit, with launch.nproc x launch.nnodes = 64 ranks$",
        ),
        (
            (
                *("model=16b", MUCH, "parallel=fsdp", "train.sequence_length=524288", "recompute=full"),
                "parallel.context=null",
            ),
            "parallel.degrees.tp=[0-9]+ fit, with",
        ),
        (
            ("parallel=fsdp", "launch.nproc=64", "train.sequence_length=16384", "recompute=full"),
            r"^parallel.degrees.dp_shard=\d+ fits, with launch.nproc x launch.nnodes = \d+ ranks$",
        ),
    ],
)
def test_what_is_suggested_fits(planned: PlannedCommand, arguments: tuple[str, ...], words: str) -> None:
    _, fix = refused(planned, *arguments)
    assert re.search(words, fix), fix
    for again in typed_again(fix, arguments):
        merged = {argument.partition("=")[0]: argument for argument in again}
        outcome = planned.run(*merged.values())
        assert outcome.code == 0, (again, outcome.err)
        assert outcome.job.plan.fits, again


def test_the_fix_is_in_the_plan_too_and_a_plan_without_one_says_so(planned: PlannedCommand) -> None:
    need, fix = refused(planned, "model=671b", "parallel=tp_ep")
    assert re.search("on 256 ranks of hardware=cpu do not fit: a rank needs [\\d.]+ GiB, has 0.09 GiB", need)
    plan = plan_16b(dp_shard=3)
    assert format_plan(plan, fix).splitlines()[-1].split(maxsplit=2) == ["nearest", "fix", fix]
    tiny = "hardware.memory_bytes=1"
    _, fix = refused(planned, "hardware=b200", tiny, "hardware.name=own", "parallel=fsdp", "launch.nproc=2")
    assert fix.startswith("no layout, batch or sequence length fits hardware=own; task=plan hardware=h100 ")


def test_gpus_are_listed_from_the_smallest() -> None:
    sizes = [gpu.memory_bytes or 0 for gpu in named_hardware()]
    assert sizes == sorted(sizes)
    assert [gpu.name for gpu in named_hardware()][:3] == ["h100", "h800", "a100"]


def test_what_fits_or_is_unknown_is_let_through(planned: PlannedCommand) -> None:
    assert planned.run("model=16b", "parallel=fsdp", MUCH, "recompute=full").code == 0
    unknown = replace(plan_16b(), hardware=replace(plan_16b().hardware, memory_bytes=None))
    assert unknown.fits is None
    assert "hardware.memory_bytes is not known" in format_plan(unknown)
