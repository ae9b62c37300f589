"""Targets by hand: the next token, and the tokens after it."""

import numpy as np
import pytest
import torch

from dsv3.data.batch import collate, mtp_targets
from dsv3.data.packing import PADDING, PackedRow
from dsv3.model.head import IGNORE_INDEX

I = IGNORE_INDEX  # noqa: E741 - the tables below are to be read at a glance


def row(tokens: list[int], documents: list[int]) -> PackedRow:
    return PackedRow(np.array(tokens, np.int64), np.array(documents, np.int32))


ROWS = [
    row([1, 11, 12, 2, 1, 21, 22, 23], [0, 0, 0, 0, 1, 1, 1, 1]),
    row([31, 2, 1, 41, 2, 0, 0, 0], [0, 0, 1, 1, 1, PADDING, PADDING, PADDING]),
]


def test_targets_stay_in_their_document_and_out_of_the_padding() -> None:
    batch = collate(ROWS)
    assert batch.tokens.tolist() == [[1, 11, 12, 2, 1, 21, 22], [31, 2, 1, 41, 2, 0, 0]]
    assert batch.targets.tolist() == [[11, 12, 2, I, 21, 22, 23], [2, I, 41, 2, I, I, I]]
    assert batch.documents.tolist() == [[0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, -1, -1]]
    assert (batch.tokens.dtype, batch.targets.dtype) == (torch.int64, torch.int64)
    assert batch.documents.dtype == torch.int32
    assert all(x.is_contiguous() for x in (batch.tokens, batch.targets, batch.documents))


def test_lengths_are_told_where_a_row_has_padding_and_only_there() -> None:
    batch = collate(ROWS)
    assert (batch.lengths, batch.num_sequences, batch.num_tokens) == ([7, 5], 2, 12)
    full = collate(ROWS[:1])
    assert (full.lengths, full.num_sequences, full.num_tokens) == (None, 1, 7)
    # Only the token behind the inputs is missing: it is a target that does not count.
    last = collate([row([1, 2, 3], [0, 0, PADDING])])
    assert (last.lengths, last.targets.tolist()) == (None, [[2, I]])
    empty = collate([ROWS[0], row([0] * 8, [PADDING] * 8)])
    assert (empty.lengths, empty.num_sequences, empty.num_tokens) == ([7, 0], 1, 7)
    with pytest.raises(ValueError, match="padding before a token"):
        collate([row([1, 0, 2, 3], [0, PADDING, 1, 1])]).lengths  # noqa: B018


def test_targets_of_multi_token_prediction_by_hand() -> None:
    batch = collate(ROWS)
    assert mtp_targets(batch.targets, batch.documents, 1).tolist() == [
        [12, 2, I, I, 22, 23, I],
        [I, I, 2, I, I, I, I],
    ]
    assert mtp_targets(batch.targets, batch.documents, 2).tolist() == [
        [2, I, I, I, 23, I, I],
        [I] * 7,
    ]
    for depth in (3, 6, 7, 8, 20):
        assert mtp_targets(batch.targets, batch.documents, depth).tolist() == [[I] * 7] * 2
    assert mtp_targets(batch.targets, batch.documents, 0).tolist() == batch.targets.tolist()


def test_targets_of_every_depth_against_the_definition() -> None:
    draw = np.random.default_rng(0)
    rows = [
        PackedRow(draw.integers(0, 99, 33), np.cumsum(draw.random(33) < 0.15).astype(np.int32))
        for _ in range(8)
    ]
    batch = collate(rows)
    for depth in range(1, 6):
        found = mtp_targets(batch.targets, batch.documents, depth)
        for number, (tokens, documents) in enumerate(rows):
            for i in range(32):
                there = i + 1 + depth
                inside = there <= 32 and documents[there] == documents[i]
                assert found[number, i] == (tokens[there] if inside else IGNORE_INDEX)


def test_a_batch_moves_to_a_device_as_a_whole() -> None:
    moved = collate(ROWS).to("meta")
    assert {x.device.type for x in (moved.tokens, moved.targets, moved.documents)} == {"meta"}
