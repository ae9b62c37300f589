"""What evaluation and generation need at least: every rank's share of the weights, and the KV cache."""

import contextlib
import re
from dataclasses import replace

import pytest

from dsv3.config.hardware import HardwareConfig
from dsv3.config.parallel import Schedule
from dsv3.errors import UserError
from dsv3.planning.checks import require_room
from dsv3.planning.layout import ParallelDims
from dsv3.planning.parameters import total
from dsv3.planning.pipeline_stages import PipelineShape
from dsv3.planning.plan import Plan, plan_from_shape
from dsv3.planning.step_shape import StateBytes, StepShape
from tests.planning.presets import preset

MODEL = preset("16b")
NEEDED = 4 * total(MODEL)
BF16 = StepShape(1, 4096, state=StateBytes(compute=2))
TOKEN = 27 * 576 * 2
"""Bytes of a token's latents: 27 layers of 512 + 64 values in bf16."""


def plan(room: int | None, degrees: ParallelDims | None = None, shape: StepShape = BF16) -> Plan:
    """Return the plan on ranks with `room` bytes."""
    return plan_from_shape(MODEL, degrees or ParallelDims(), HardwareConfig("cpu", memory_bytes=room), shape)


def test_weights_that_just_fit_are_held_and_one_byte_less_is_told_with_the_numbers() -> None:
    require_room(plan(NEEDED))
    with pytest.raises(UserError) as error:
        require_room(plan(NEEDED - 1))
    for words in (f"{total(MODEL):,}", f"{NEEDED / 2**30:.2f} GiB", "with 2 or more ranks"):
        assert words in str(error.value)
    assert len(str(error.value).splitlines()) == 2


def test_ranks_that_share_a_node_are_not_told_to_be_more() -> None:
    """Each of four ranks has a quarter of the node, which more of them would cut again."""
    with pytest.raises(UserError) as error:
        require_room(plan(NEEDED // 20, ParallelDims(dp_shard=4)), host_ranks=4)
    told = str(error.value).splitlines()[1]
    assert told.startswith(f"more ranks here share the same {NEEDED / 5 / 2**30:,.2f} GiB: ")
    nodes = re.search("on ([0-9]+) or more such nodes", told)
    assert nodes
    for count, fits in ((int(nodes[1]), True), (int(nodes[1]) - 1, False)):
        refusal = contextlib.nullcontext() if fits else pytest.raises(UserError)
        with refusal:
            require_room(plan(NEEDED // 20 * 4, ParallelDims(dp_shard=count)), host_ranks=1)


def test_every_axis_but_replicas_shares_the_weights_out() -> None:
    quarter = NEEDED // 4 + 1
    require_room(plan(quarter, ParallelDims(dp_shard=4)))
    require_room(plan(quarter, ParallelDims(dp_replicate=2, pp=2, tp=2)))
    with pytest.raises(UserError, match="do not fit"):
        require_room(plan(quarter, ParallelDims(dp_replicate=4)))


def test_the_cache_of_what_is_generated_counts_on_every_rank() -> None:
    for ranks in (1, 4):
        room = NEEDED // ranks + 1000 * TOKEN + 1
        require_room(plan(room, ParallelDims(dp_shard=ranks)), tokens=1000)
        with pytest.raises(UserError) as error:
            require_room(plan(room, ParallelDims(dp_shard=ranks)), tokens=1001)
        assert "the KV cache of 1,001 tokens does not fit" in str(error.value)
        assert str(error.value).endswith("task.max_tokens together may have 1,000 tokens")
        assert len(str(error.value).splitlines()) == 2


def test_a_stage_caches_its_own_layers() -> None:
    piped = replace(BF16, microbatches=2, pipelining=PipelineShape(Schedule.GPipe, split=(14,)))
    room = NEEDED // 2 + 1000 * TOKEN * 14 // 27 + 1
    require_room(plan(room, ParallelDims(pp=2), piped), tokens=1000)
    with pytest.raises(UserError, match="may have 1,000 tokens"):
        require_room(plan(room, ParallelDims(pp=2), piped), tokens=1002)


def test_unknown_memory_is_no_reason_to_refuse() -> None:
    require_room(plan(None), tokens=10**9)
