"""Large worlds: a rank has the shards that the plan computes, and starts without what others hold.

benchmarks/scale.py measures the same way at real sizes.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dsv3.errors import UserError
from dsv3.hf.storage_reader import HFStorageReader
from dsv3.model.initialization import NormalValues
from dsv3.parallel.parallel_model import ParallelModel
from dsv3.parallel.parallelize import shard_of
from dsv3.planning.memory import pipeline_memory
from tests.convert.sparse_release import write_sparse_release
from tests.harness.composing import strict_config
from tests.harness.tiny import MODEL
from tests.parallel.fake_world import (
    build_on_meta,
    fake_rank,
    gathered_in_fp8,
    local_shards,
    plan_world,
    planned_shapes,
    shapes,
    start,
    take_step,
)

pytestmark = pytest.mark.slow

FP32 = 4
IN_FP8 = ["precision=fp8", "precision.fp8.gather=true", "hardware=h800"]
RANKS = [
    ("671b", "tp_ep", 2048, "first"),
    ("671b", "tp_ep", 512, "last"),
    ("671b", "cp", 512, "last"),
    ("debug", "tp_ep", 4, "first"),
    ("debug", "hsdp", 2, "last"),
    ("671b", "pp", 2048, "first"),
    ("671b", "pp", 2048, "last"),
    ("671b", "full", 2048, "first"),
    ("671b", "full", 2048, "last"),
    ("kimi_k2", "pp", 4096, "first"),
    ("kimi_k2", "pp", 4096, "last"),
]


@pytest.mark.parametrize(("model", "layout", "world", "end"), RANKS)
def test_a_rank_of_a_large_world_has_the_shards_that_are_planned(
    model: str, layout: str, world: int, end: str
) -> None:
    job = plan_world(model, layout, world, *IN_FP8)
    degrees, rank = job.plan.degrees, world - 1 if end == "last" else 0
    assert degrees.world_size == world
    shards = build_on_meta(job, rank)
    assert {shard.device.type for shard in shards} == {"meta"}
    expected = planned_shapes(job, rank)
    assert shapes(shards) == expected
    assert shapes(gathered_in_fp8(shards)) == planned_shapes(job, rank, in_fp8=True)
    held = sum(shard.nbytes for shard in shards)
    assert held == FP32 * sum(math.prod(shape) * count for shape, count in expected.items())
    fullest = pipeline_memory(job.config.model, degrees, job.plan.shape)[-1 if rank else 0].parameters
    # The plan tells the first shards' bytes; where they divide unevenly the last ones are shorter.
    assert held <= fullest if rank else held == fullest


class World(NamedTuple):
    """A layout of the tiny model: the typed words and the ranks that are looked at."""

    words: str
    world: int
    ranks: tuple[int, ...]
    steps: bool = True


WORLDS = {
    "fsdp, more ranks than rows and than experts": World("parallel=fsdp parallel.degrees.ep=8", 64, (5, 63)),
    "hsdp": World("parallel=hsdp parallel.degrees.ep=2", 16, (9,)),
    "tp_ep, strided": World("parallel=tp_ep parallel.degrees.tp=2 parallel.degrees.ep=8", 16, (15,)),
    "cp": World("parallel=cp", 8, (7,)),
    "full": World("parallel=full parallel.degrees.dp_replicate=1", 16, (7,), steps=False),
}


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    """Return the initial weights of one process by name."""
    with fake_rank(0, 1) as ranks:
        model = start([*MODEL, "model=debug", *TRAINING], ranks, lambda name: None)
    return {name: tensor.detach() for name, tensor in model.model_parts[0].named_parameters()}


TRAINING = ["train.sequence_length=32", "train.microbatch_size=1", "data.held_out=0.1"]


@pytest.mark.parametrize("layout", WORLDS)
def test_a_rank_goes_the_whole_way_with_its_own_shards_alone(
    layout: str, alone: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Initial weights are those of one process, a load draws nothing and gathers no plan, a step computes."""
    words, world, chosen, steps = WORLDS[layout]
    command = [*MODEL, "model=debug", *TRAINING, f"train.global_batch_size={world}", *words.split()]
    write_sparse_release(tmp_path, strict_config([*MODEL, "model=debug"]).model, file_bytes=10**5)
    drawn: list[int] = []
    monkeypatch.setattr(NormalValues, "_values", _counting(NormalValues._values, drawn))
    monkeypatch.setattr(torch.distributed, "gather_object", _never)
    for rank in chosen:
        with fake_rank(rank, world) as ranks:
            phases: list[str] = []
            model = start(command, ranks, phases.append)
            for name, parameter in _parameters(model):
                local, offset = shard_of(parameter)
                box = tuple(slice(at, at + length) for at, length in zip(offset, local.shape, strict=True))
                assert torch.equal(local, alone[name][box] if local.numel() else local)
            # Rows are computed in whole vectors: these are narrow, 32 values where there are as few as 16.
            matrices = sum(shard.numel() for shard in local_shards(model) if shard.ndim > 1)
            assert matrices <= sum(drawn) <= 2 * matrices
            drawn.clear()
            model = start([*command, f"checkpoint.load=hf:{tmp_path}"], ranks, phases.append)
            assert not drawn
            assert all(
                (shard == 0).all() for shard in local_shards(model)
            )  # holes are zeros, and all is read
            assert phases.count("mesh") == 2
            assert phases[-1] == "build and load"
            if steps:
                loss = take_step(command, ranks, model).loss
                assert loss.item() > 0  # of weights that are zeros
        drawn.clear()


def test_shards_of_all_ranks_are_the_whole_model(alone: dict[str, Tensor]) -> None:
    """Strided, uneven and empty shards: together they hold each value once."""
    words, world = "parallel=tp_ep parallel.degrees.tp=2 parallel.degrees.ep=4", 8
    command = [*MODEL, "model=debug", *TRAINING, f"train.global_batch_size={world}", *words.split()]
    seen = {name: torch.zeros_like(whole) for name, whole in alone.items()}
    for rank in range(world):
        with fake_rank(rank, world) as ranks:
            for name, parameter in _parameters(start(command, ranks, lambda name: None)):
                assert isinstance(parameter, DTensor)
                local, offset = shard_of(parameter)
                if local.numel():
                    at = tuple(slice(o, o + length) for o, length in zip(offset, local.shape, strict=True))
                    seen[name][at] += 1
    assert all((counts == 1).all() for counts in seen.values())


def test_a_rank_that_cannot_read_its_shard_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sparse_release(tmp_path, strict_config([*MODEL, "model=debug"]).model)
    fill = HFStorageReader._fill

    def but_one(reader: HFStorageReader, tensor: object, item: object, target: Tensor) -> None:
        if "lm_head" not in str(tensor):
            fill(reader, tensor, item, target)  # type: ignore[arg-type]

    monkeypatch.setattr(HFStorageReader, "_fill", but_one)
    command = [*MODEL, "model=debug", "parallel=fsdp", f"checkpoint.load=hf:{tmp_path}"]
    with fake_rank(3, 16) as ranks, pytest.raises(UserError, match=r"leaves values of 'model\.head\.weight'"):
        start([*command, "train.global_batch_size=16"], ranks, lambda name: None)


def _parameters(model: ParallelModel) -> list[tuple[str, Tensor]]:
    return [item for part in model.model_parts for item in part.named_parameters()]


def _counting(values: Callable[..., Tensor], drawn: list[int]) -> Callable[..., Tensor]:
    def counted(*arguments: object) -> Tensor:
        result = values(*arguments)
        drawn.append(result.numel())
        return result

    return counted


def _never(*arguments: object, **named: object) -> None:
    raise AssertionError("every rank's plan was gathered")
