"""Slices of an HF checkpoint for every sharding, bit for bit against whole weights dequantized at once."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from dsv3.checkpoint.load import parameter_shapes
from dsv3.errors import UserError
from dsv3.hf.names import hf_layout
from dsv3.hf.storage_reader import HFSource, HFStorageReader
from tests.convert.releases import small_model, write_release
from tests.fp8.plain import dequantize_reference

BLOCKS = [(32, 32), (128, 128), (16, 48), (7, 5)]


class Case:
    """An HF checkpoint in fp8 with blocks of one size, and its parameters by plain arithmetic."""

    def __init__(self, directory: Path, block: tuple[int, int]) -> None:
        model = small_model()
        released = write_release(directory, model, "fp8", block=block, scales_apart=True)
        shapes = parameter_shapes(model)
        self.source = HFSource(directory, model, shapes)
        self.whole = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
        for tensor in hf_layout(model, shapes):
            value = released[tensor.name]
            if value.dtype is torch.float8_e4m3fn:
                value = dequantize_reference(value, released[tensor.name + "_scale_inv"], block)
            box = tuple(slice(o, o + n) for o, n in zip(tensor.offset, tensor.sizes, strict=True))
            self.whole[tensor.parameter][box] = value.float().view(tensor.sizes)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Case]]:
    made = [Case(tmp_path_factory.mktemp("release"), block) for block in BLOCKS]
    yield made
    for case in made:
        case.source.close()


class Planner(LoadPlanner):
    """Asks for one box of one parameter, as DCP does for a shard: for each HF tensor its own part."""

    def __init__(self, target: Tensor, offset: list[int]) -> None:
        self.target, self.offset = target, offset

    def plan(self, name: str, reader: HFStorageReader) -> LoadPlan:
        items = []
        sizes = list(self.target.shape)
        for chunk in reader.read_metadata().state_dict_metadata[f"model.{name}"].chunks:  # type: ignore[union-attr]
            low = [max(a, b) for a, b in zip(self.offset, chunk.offsets, strict=True)]
            high = [
                min(a + n, b + m)
                for a, n, b, m in zip(self.offset, sizes, chunk.offsets, chunk.sizes, strict=True)
            ]
            if all(a < b for a, b in zip(low, high, strict=True)):
                items.append(
                    ReadItem(
                        LoadItemType.TENSOR,
                        dest_index=MetadataIndex(f"model.{name}"),
                        dest_offsets=torch.Size(a - b for a, b in zip(low, self.offset, strict=True)),
                        storage_index=MetadataIndex(f"model.{name}", chunk.offsets),
                        storage_offsets=torch.Size(a - b for a, b in zip(low, chunk.offsets, strict=True)),
                        lengths=torch.Size(b - a for a, b in zip(low, high, strict=True)),
                    )
                )
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        box = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self.target[tuple(slice(o, o + n) for o, n in box)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Do nothing: the values are in place."""

    def set_up_planner(self, *args: object, **kwargs: object) -> None: ...
    def create_local_plan(self) -> LoadPlan: ...  # type: ignore[empty-body]
    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]: ...  # type: ignore[empty-body]
    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan: ...  # type: ignore[empty-body]
    def load_bytes(self, *args: object) -> None: ...


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_any_box_of_any_parameter_is_exact(cases: list[Case], data: st.DataObject) -> None:
    """Draw the boxes of shards of 2 to 64 ranks along any dims, and any others; fp32 and bf16 targets."""
    case = data.draw(st.sampled_from(cases))
    name = data.draw(st.sampled_from(sorted(case.whole)))
    whole, dtype = case.whole[name], data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    offset, sizes = [], []
    for length in whole.shape:
        if data.draw(st.booleans()):
            ranks = data.draw(st.integers(2, 64))
            part = -(-length // ranks)
            first = min(length - 1, part * data.draw(st.integers(0, ranks - 1)))
            last = min(length, first + part)
        else:
            first = data.draw(st.integers(0, length - 1))
            last = data.draw(st.integers(first + 1, length))
        offset.append(first)
        sizes.append(last - first)
    target = torch.full(sizes, torch.nan, dtype=dtype)
    planner, reader = Planner(target, offset), HFStorageReader(case.source)
    plan = reader.prepare_local_plan(planner.plan(name, reader))
    reader.read_data(plan, planner).wait()
    expected = whole[tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))].to(dtype)
    assert torch.equal(target, expected)


def test_another_width_than_config_jsons_is_told_as_the_configured_models(tmp_path: Path) -> None:
    write_release(tmp_path / "release", small_model())
    other = small_model("model.dim=128")
    with pytest.raises(UserError, match=r"the configured model makes it .*: leave model\.dim=128 out"):
        HFSource(tmp_path / "release", other, parameter_shapes(other))


def test_the_whole_of_a_model_is_read(tmp_path: Path) -> None:
    from dsv3.checkpoint.load import load_weights
    from dsv3.config.strict import build

    case = Case(tmp_path, (32, 32))
    with closing(case.source):
        model = build(small_model())
        load_weights([model], tmp_path)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, case.whole[name]), name
