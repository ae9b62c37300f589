"""Process groups of several ranks: how long their collectives wait, and how their ranks stop as one.

In one process: the device and the threads of a rank, and the settings of CUDA's allocator.
"""

import pytest

from dsv3.distributed.device import ALLOCATOR, choose_gpu, cpu_threads, use_expandable_segments
from dsv3.distributed.heartbeat import FIRST_CALL
from dsv3.distributed.process_group import MARGIN, PATIENT
from dsv3.errors import UserError
from dsv3.planning.layout import ParallelDims
from tests.distributed.worker_groups import TIMEOUT, stopped_evaluation, timeouts
from tests.harness.pool import Pool
from tests.parallel.tiny_training import configured


def test_launch_timeout_reaches_every_process_group(pool: Pool) -> None:
    """Of every axis of parallel=full, also those that FSDP, the pipeline and DTensor make or come to use."""
    trained = ParallelDims(pp=2, dp_shard=2, tp=2, ep=4)
    others = [ParallelDims(dp_shard=2, cp=2, tp=2, ep=4), ParallelDims(dp_replicate=2, pp=2, cp=2, ep=2)]
    config = configured(["parallel=full", "parallel.schedule=1F1B"], 1)
    for made, first, later in pool.run(timeouts, config, trained, others):
        assert first.keys() == later.keys() == made.keys()  # the step has made none
        names = " ".join(made)
        assert all(f"mesh_{axis}" in names for axis in ("pp", "dp_replicate", "fsdp", "cp", "tp", "ep"))
        patient = {name for name in made if name.endswith(PATIENT)}
        assert len(patient) == 1
        assert len(made) > 12
        for name in made:
            expected = (
                [7 * 24 * 3600.0] * 2
                if name in patient
                else [TIMEOUT + MARGIN + FIRST_CALL, TIMEOUT + MARGIN]
            )
            assert [first[name], later[name]] == expected, name


def test_an_evaluation_ends_at_the_same_batch_on_all_ranks_whichever_is_asked(pool: Pool) -> None:
    assert pool.run(stopped_evaluation, {2: 5, 6: 3}) == [(5, True)] * pool.size


@pytest.mark.parametrize(
    ("local_rank", "ranks", "visible", "variables", "gpu"),
    [
        (3, 8, 8, {}, 3),
        (0, 1, 1, {}, 0),
        (2, 4, 8, {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, 2),
        (5, 8, 1, {"CUDA_VISIBLE_DEVICES": "5"}, 0),  # srun --gpus-per-task=1
        (5, 8, 1, {"SLURM_PROCID": "13"}, 0),
    ],
)
def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one_that_it_sees(
    local_rank: int, ranks: int, visible: int, variables: dict[str, str], gpu: int
) -> None:
    assert choose_gpu(local_rank, ranks, visible, variables) == gpu


@pytest.mark.parametrize(("local_rank", "ranks", "visible"), [(1, 2, 1), (0, 2, 1), (4, 8, 4)])
def test_ranks_without_a_gpu_of_their_own_are_told_the_numbers(
    local_rank: int, ranks: int, visible: int
) -> None:
    with pytest.raises(UserError) as refused:
        choose_gpu(local_rank, ranks, visible, {})
    assert f"{ranks} ranks on this node and {visible} GPUs visible to rank {local_rank}" in str(refused.value)


def test_the_allocator_grows_its_segments_unless_the_user_has_set_it() -> None:
    found: dict[str, str] = {}
    use_expandable_segments(found)
    assert found == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for name in ALLOCATOR:
        found = {name: "max_split_size_mb:512"}
        use_expandable_segments(found)
        assert found == {name: "max_split_size_mb:512"}


@pytest.mark.parametrize(
    ("asked", "ranks", "expected"),
    [
        (None, 1, 8),
        ("3", 1, 3),
        ("", 1, 8),
        ("0", 1, 8),
        ("many", 1, 8),
        ("1", 4, 2),  # torchrun's own
        (None, 16, 1),
    ],
)
def test_one_process_has_what_it_is_told_several_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, ranks: int, expected: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert cpu_threads(ranks, {} if asked is None else {"OMP_NUM_THREADS": asked}) == expected
