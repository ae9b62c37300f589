from dataclasses import replace

import pytest

from dsv3.config.hardware import HardwareConfig
from dsv3.config.parallel import RecomputeMode, SavedOp
from dsv3.errors import UserError
from dsv3.planning.report import GIB, format_plan, require_fits, smallest_dp_shard, suggest_fix
from tests.planning.plans import SHAPE, plan_16b


def test_a_plan_that_does_not_fit_says_how_many_shards_would() -> None:
    plan = plan_16b(dp_shard=3)
    need = f"needs {plan.memory.total / GIB:,.2f} GiB, has 74.51 GiB"
    smallest = smallest_dp_shard(plan)
    assert smallest is not None
    assert smallest.dp_shard == 6
    assert plan_16b(dp_shard=6).fits
    verdict, advice = format_plan(plan).splitlines()[-2:]
    assert verdict.split(maxsplit=1) == ["verdict", f"does not fit: {need}"]
    assert "parallel.degrees.dp_shard=6 fits" in advice
    with pytest.raises(UserError) as refused:
        require_fits(plan)
    first, second = str(refused.value).splitlines()
    assert first == f"15,706,484,224 parameters on 3 ranks of hardware=h800 do not fit: a rank {need}"
    assert second == "parallel.degrees.dp_shard=6 fits, with launch.nproc x launch.nnodes = 6 ranks"


def test_the_least_recomputation_that_is_enough_is_the_nearest_fix() -> None:
    plan = plan_16b(
        shape=replace(SHAPE, microbatch_size=4, recompute=RecomputeMode.none, keep=(SavedOp.attention,))
    )
    with pytest.raises(UserError, match=r"\nrecompute=selective fits on the same ranks$"):
        require_fits(plan)
    plan = plan_16b(
        shape=replace(SHAPE, microbatch_size=8, recompute=RecomputeMode.none, keep=tuple(SavedOp))
    )
    with pytest.raises(UserError, match=r"\nrecompute=full fits on the same ranks$"):
        require_fits(plan)


def test_activations_alone_may_be_too_large() -> None:
    plan = plan_16b(shape=replace(SHAPE, microbatch_size=64))
    assert smallest_dp_shard(plan) is None
    assert "would fit" not in format_plan(plan)
    with pytest.raises(UserError, match=r"\nno dp_shard helps, .* train.microbatch_size=64 or") as refused:
        require_fits(plan)
    assert len(str(refused.value).splitlines()) == 2
    assert format_plan(plan).endswith(str(refused.value).splitlines()[1])


def test_only_what_can_be_lowered_or_raised_is_advised() -> None:
    shape = replace(SHAPE, microbatch_size=1, sequence_length=2**21)
    advice = suggest_fix(plan_16b(shape=shape))
    assert "train.microbatch_size" not in advice
    assert (
        "lower train.sequence_length=2097152, or raise parallel.degrees.ep or parallel.degrees.tp" in advice
    )


def test_recomputation_and_shards_together_may_be_needed() -> None:
    plan = plan_16b(dp_shard=2, shape=replace(SHAPE, microbatch_size=8, recompute=RecomputeMode.none))
    with pytest.raises(UserError, match=r"\nrecompute=full and parallel.degrees.dp_shard=(4|8) fits"):
        require_fits(plan)


def test_what_fits_or_is_unknown_is_let_through() -> None:
    require_fits(plan_16b())
    unknown = plan_16b(hardware=HardwareConfig(name="x"))
    require_fits(unknown)
    assert unknown.fits is None
    assert "hardware.memory_bytes is not known" in format_plan(unknown)
