"""Checksums: every flipped bit changes them, and the element is found."""

import pytest
import torch
from torch import Tensor

from dsv3.checkpoint import replicas
from dsv3.checkpoint.bit_sums import COLUMNS, BitSums, bit_sums, checksum, find_difference, words_of
from dsv3.checkpoint.replicas import ReplicaGroup, replica_groups
from dsv3.checkpoint.state import model_state, optimizer_state
from tests.harness.trained import Trained

SIZES = (1, 2, 3, 7, COLUMNS - 1, COLUMNS, 3 * COLUMNS + 5)
TYPES = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float8_e4m3fn: torch.uint8,
    torch.int64: torch.int64,
    torch.bool: torch.uint8,
}


def make(size: int, kind: torch.dtype) -> Tensor:
    """Return a tensor of random values, large ones among them."""
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)) * 1e3
    return (values > 0) if kind == torch.bool else values.to(kind)


def flipped(tensor: Tensor, element: int, bit: int) -> Tensor:
    """Return a copy with one bit flipped."""
    copy = tensor.clone()
    bits = copy.view(TYPES[tensor.dtype])
    width = 8 * tensor.element_size()
    bits[element] ^= -(2**63) if bit == 63 else 1 << bit if bit < width - 1 or width == 8 else -(1 << bit)
    return copy


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_each_flipped_bit_changes_the_sum_and_its_place_is_found(kind: torch.dtype) -> None:
    for size in SIZES:
        tensor = make(size, kind)
        own, before = bit_sums(words_of(tensor)), int(checksum(words_of(tensor)))
        for element in sorted({0, size // 2, size - 1}):
            for bit in range(8 * tensor.element_size()):
                other = flipped(tensor, element, bit)
                assert int(checksum(words_of(other))) != before, (size, element, bit)
                found = find_difference(own, bit_sums(words_of(other)), tensor)
                assert found == (element, bit), (size, element, bit)
        assert int(checksum(words_of(tensor.clone()))) == before


def test_exchanged_elements_change_the_sum_and_several_changes_have_no_one_place() -> None:
    tensor = make(3 * COLUMNS + 5, torch.float32)
    before = int(checksum(words_of(tensor)))
    for one, other in ((0, 1), (0, COLUMNS), (5, 2 * COLUMNS + 9), (0, 3 * COLUMNS + 1)):
        changed = tensor.clone()
        changed[[one, other]] = tensor[[other, one]]
        assert int(checksum(words_of(changed))) != before
        assert find_difference(bit_sums(words_of(tensor)), bit_sums(words_of(changed)), tensor) is None
    value = tensor.clone()
    value.view(torch.int32)[17] ^= 0b101
    assert find_difference(bit_sums(words_of(tensor)), bit_sums(words_of(value)), tensor) == (17, None)


def test_the_sum_is_that_of_the_elements_wherever_they_lie() -> None:
    values = make(2 * COLUMNS + 6, torch.bfloat16).view(2, -1)
    expected = int(checksum(words_of(values.t().contiguous())))
    assert int(checksum(words_of(values.t()))) == expected
    shifted = torch.cat([values.new_zeros(1), values.t().flatten()])[1:]  # begins within a word
    assert len(words_of(shifted)) == shifted.numel()
    assert int(checksum(words_of(values[:0]))) == 0
    assert [len(part) for part in BitSums(*bit_sums(words_of(values)))] == [1, COLUMNS, 3]


def test_a_group_notices_each_tensor_and_exchanged_ones_packed_or_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors = {f"t{n}": make(40 + 20 * (n > 2), torch.float32) + n for n in range(6)}
    for small, pack in ((2**20, 2**24), (50, 80), (0, 1)):
        monkeypatch.setattr(replicas, "SMALL", small)
        monkeypatch.setattr(replicas, "PACK", pack)
        before = int(ReplicaGroup(tensors).checksum())
        assert int(ReplicaGroup({name: each.clone() for name, each in tensors.items()}).checksum()) == before
        for name, tensor in tensors.items():
            assert int(ReplicaGroup(tensors | {name: flipped(tensor, 3, 30)}).checksum()) != before
        assert int(ReplicaGroup(tensors | {"t0": tensors["t1"], "t1": tensors["t0"]}).checksum()) != before


def test_all_that_is_saved_and_lies_whole_on_every_rank_is_compared() -> None:
    trained = Trained(0)
    saved = [*model_state([trained.model]), *optimizer_state([trained.model], trained.optimizer)]
    groups = replica_groups([trained.model], trained.optimizer, trained.progress)
    names = {name for group in groups for name in group.tensors}
    assert names > {name for name, _ in saved}
    assert {"progress.step", "progress.samples", "progress.tokens", "progress.statistics"} <= names
    assert not {name for name in names if name.endswith(".load") or name.startswith("random.")}
