"""The batch-size ramp: the rule of Megatron-LM, the reports' numbers, and what cannot be split."""

from collections.abc import Iterator
from itertools import islice

import pytest

from dsv3.config.parallel import ParallelConfig, Schedule
from dsv3.config.training import BatchRampConfig, TrainConfig
from dsv3.errors import InvalidValue, UserError
from dsv3.planning.batch_schedule import BatchSchedule, check_ramp
from dsv3.planning.layout import ParallelDims, check_batch

V3 = BatchSchedule(15360, 3072, 3072, 469 * 10**9, 4096)
V2 = BatchSchedule(9216, 2304, 2304, 225 * 10**9, 4096)
SMALL = BatchSchedule(24, 4, 4, 1000, 7)
UNEVEN = [SMALL, BatchSchedule(24, 4, 20, 3, 7), BatchSchedule(9, 1, 1, 100, 3), BatchSchedule(8)]


def steps(batch: BatchSchedule, samples: int = 0) -> Iterator[tuple[int, int]]:
    """Yield the first sample and the size of each step."""
    while True:
        yield samples, batch.size(samples)
        samples += batch.size(samples)


def test_the_reports_ramps_end_where_they_say() -> None:
    for batch, sizes in ((V3, [3072, 6144, 9216, 12288, 15360]), (V2, [2304, 4608, 6912, 9216])):
        assert list(batch.sizes) == sizes
        *ramp, whole = batch.stretches()
        assert [stretch.size for stretch in (*ramp, whole)] == sizes
        tokens = batch.sequence_length * whole.first_sample
        assert batch.tokens <= tokens < batch.tokens + sizes[-2] * batch.sequence_length
        # Each size has an equal share of the tokens, but for the step that crosses into the next one.
        for stretch in ramp:
            assert stretch.steps is not None
            share = stretch.steps * stretch.size * batch.sequence_length
            assert abs(share - batch.tokens / len(ramp)) <= sizes[-1] * batch.sequence_length
    # 469e9 / 4 tokens at each of four sizes: 117.25e9 / 4096 x (1/3072 + 1/6144 + 1/9216 + 1/12288).
    assert V3.ramp_steps == 9318 + 4659 + 3106 + 2329 + 2
    assert V3.samples_after(0, 235_000) * 4096 == pytest.approx(
        469e9 + (235_000 - 19_414) * 62_914_560, rel=1e-3
    )


@pytest.mark.parametrize("batch", [V3, V2])
def test_the_size_is_that_of_megatrons_rampup(batch: BatchSchedule) -> None:
    """Its rule in its own floats, away from the boundaries where they round."""
    ramp = batch.tokens / batch.sequence_length
    per_increment = ramp / (len(batch.sizes) - 1)
    for samples in range(0, int(2 * ramp), 999_983):
        grown = int(samples / per_increment)
        expected = batch.first + grown * batch.increment if samples <= ramp else batch.final
        assert batch.size(samples) == expected


@pytest.mark.parametrize("batch", UNEVEN)
def test_stretches_and_sums_are_those_of_the_steps_one_by_one(batch: BatchSchedule) -> None:
    taken = list(islice(steps(batch), 400))
    for place in (*range(60), 200):
        samples = taken[place][0]
        for count in (0, 1, 2, 5, 17, 100):
            assert batch.samples_after(samples, count) == taken[place + count][0]
        stretched = [
            (stretch.first_sample + number * stretch.size, stretch.size)
            for stretch in batch.stretches(samples)
            for number in range(100 if stretch.steps is None else stretch.steps)
        ]
        assert stretched[:90] == taken[place : place + 90]
    assert {size for _, size in taken} <= set(batch.sizes)
    assert taken[batch.ramp_steps][1] == batch.final
    assert batch.ramp_steps == 0 or taken[batch.ramp_steps - 1][1] < batch.final


@pytest.mark.parametrize(
    ("values", "key", "allowed"),
    [
        ({"tokens": 5}, "batch_ramp.tokens", "needs batch_ramp.start"),
        ({"start": 4}, "batch_ramp.tokens", "give the tokens"),
        ({"start": 0, "tokens": 5}, "batch_ramp.start", "above 0"),
        ({"start": 24, "tokens": 5}, "batch_ramp.start", "below train.global_batch_size=24"),
        ({"start": 4, "tokens": 5, "increment": 3}, "batch_ramp.increment", "nearest that work: 2 or 4"),
        ({"start": 16, "tokens": 5}, "batch_ramp.increment", "nearest that work: 8"),
    ],
)
def test_a_ramp_that_leads_nowhere_is_told_with_what_works(
    values: dict[str, int], key: str, allowed: str
) -> None:
    def check() -> None:
        ramp = BatchRampConfig(**values)
        ramp.validate()
        TrainConfig(global_batch_size=24, batch_ramp=ramp).validate()

    with pytest.raises(InvalidValue) as refused:
        check()
    assert refused.value.key in (key, key.partition(".")[2])
    assert allowed in refused.value.allowed
    with pytest.raises(InvalidValue, match="global_batch_size=null"):
        TrainConfig(batch_ramp=BatchRampConfig(4, 5)).validate()


def suggested(message: str, batch: BatchSchedule) -> list[BatchSchedule]:
    """Return the ramps that an error suggests."""
    _, _, works = message.partition("nearest that work: ")
    start, found = batch.start, []
    for word in works.replace(",", " ").split():
        name, _, number = word.rpartition("=")
        if name.endswith("start"):
            start = int(number)
        elif number.isdigit():
            found.append(BatchSchedule(batch.final, start, int(number), batch.tokens, batch.sequence_length))
    return found


@pytest.mark.parametrize(
    ("final", "start", "increment", "unit"),
    [(15360, 3000, 1236, 128), (10240, 100, 507, 256), (8192, 1024, 512, 1024), (16384, 3072, 1024, 2048)],
)
def test_each_size_splits_over_ranks_or_the_nearest_ramps_are_told(
    final: int, start: int, increment: int, unit: int
) -> None:
    batch = BatchSchedule(final, start, increment, 10**6, 8)
    assert (final - start) % increment == 0
    with pytest.raises(UserError, match=f"no multiple of {unit} ") as refused:
        check_ramp(batch, unit, "so many")
    message = str(refused.value)
    assert len(message.splitlines()) == 2
    near = suggested(message, batch)
    assert near, message
    for ramp in near:
        check_ramp(ramp, unit, "so many")
        assert ramp.sizes[-1] == batch.final
    if start % unit:  # one on either side, with none that works in between
        assert [ramp.first for ramp in near] == [
            s for s in (start // unit * unit, -(-start // unit) * unit) if s
        ]


def test_a_pipeline_that_cannot_run_a_size_is_told_before_launch() -> None:
    ramp = BatchSchedule(64, 4, 4, 1000, 8)
    with pytest.raises(UserError, match=r"2 microbatches a step, which .*1F1B on 4 x 1") as error:
        check_batch(ParallelConfig(), ParallelDims(pp=4, dp_shard=2), ramp, 1)
    for near in suggested(str(error.value), ramp):
        check_batch(ParallelConfig(), ParallelDims(pp=4, dp_shard=2), near, 1)
    v = ParallelConfig(schedule=Schedule.Interleaved1F1B)  # microbatches in whole rounds
    with pytest.raises(UserError, match="9 microbatches a step") as error:
        check_batch(v, ParallelDims(pp=4), BatchSchedule(16, 8, 1, 1000, 8), 1)
    for near in suggested(str(error.value), BatchSchedule(16, 8, 1, 1000, 8)):
        check_batch(v, ParallelDims(pp=4), near, 1)
    check_batch(ParallelConfig(), ParallelDims(pp=16, dp_shard=128), V3, 1)  # as the report trained
