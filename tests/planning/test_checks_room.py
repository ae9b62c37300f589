"""What evaluation and generation need at least: every rank's share of the weights."""

from dataclasses import replace

import pytest

from dsv3.config.hardware import HardwareConfig
from dsv3.config.strict import strict
from dsv3.errors import UserError
from dsv3.planning.checks import require_weights_fit
from dsv3.planning.layout import ParallelDims
from dsv3.planning.parameters import total
from tests.harness.composing import compose

MODEL = strict(compose(["model=16b"])).model
NEEDED = 4 * total(MODEL)


def test_weights_that_just_fit_are_held_and_one_byte_less_is_told_with_the_numbers() -> None:
    hardware = HardwareConfig("cpu", memory_bytes=NEEDED)
    require_weights_fit(MODEL, ParallelDims(), hardware)
    with pytest.raises(UserError) as error:
        require_weights_fit(MODEL, ParallelDims(), replace(hardware, memory_bytes=NEEDED - 1))
    for words in (f"{total(MODEL):,}", f"{NEEDED / 2**30:.2f} GiB", "with 2 or more ranks"):
        assert words in str(error.value)
    assert len(str(error.value).splitlines()) == 2


def test_every_axis_but_replicas_shares_the_weights_out() -> None:
    quarter = HardwareConfig("h100", memory_bytes=NEEDED // 4 + 1)
    require_weights_fit(MODEL, ParallelDims(dp_shard=4), quarter)
    require_weights_fit(MODEL, ParallelDims(dp_replicate=2, pp=2, tp=2), quarter)
    with pytest.raises(UserError, match="do not fit"):
        require_weights_fit(MODEL, ParallelDims(dp_replicate=4), quarter)


def test_unknown_memory_is_no_reason_to_refuse() -> None:
    require_weights_fit(MODEL, ParallelDims(), HardwareConfig("other"))
