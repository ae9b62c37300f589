import pytest

from dsv3.config.parallel import AXES, DegreesConfig
from dsv3.errors import InvalidValue
from dsv3.planning.layout import ParallelDims


def test_the_ranks_that_parameters_are_sharded_over() -> None:
    degrees = ParallelDims(pp=3, dp_replicate=2, dp_shard=8, cp=2, tp=4, ep=16)
    assert degrees.world_size == 3 * 2 * 8 * 2 * 4
    assert degrees.data_parallel == 16
    assert (degrees.fsdp_size, degrees.replicated_fsdp_size, degrees.efsdp_size) == (16, 64, 4)
    assert list(degrees.to_json()) == list(AXES)


def test_degrees_are_numbers_above_zero_or_auto() -> None:
    DegreesConfig(pp=1, ep=2, tp="auto").validate()
    for value in (0, -1, "two", "2"):
        with pytest.raises(InvalidValue, match=rf"^tp={value} is not possible: must be .* auto or null"):
            DegreesConfig(tp=value).validate()


def test_what_is_typed_and_what_is_to_fit() -> None:
    config = DegreesConfig(pp=2, tp="auto")
    assert config.typed == {"pp": 2}
    assert [axis for axis in vars(config) if config.is_auto(axis)] == ["dp_shard", "tp"]
