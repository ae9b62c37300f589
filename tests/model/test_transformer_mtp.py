"""One depth of multi-token prediction: what it joins and in which order."""

import torch
from torch import Tensor

from dsv3.model.transformer import MTPModule, shift_tokens
from tests import reference
from tests.reference import MODEL, assert_close, normal


def joined(module: MTPModule, hidden: Tensor, embedded: Tensor) -> Tensor:
    """What the module hands to its block."""
    caught: list[Tensor] = []
    module.block.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    module(hidden, embedded, torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]).expand(5, 2, 2))
    return caught[0]


def test_projection_takes_the_normed_embedding_first_and_the_normed_hidden_state_second() -> None:
    # The released eh_proj multiplies [enorm(embedding), hnorm(hidden)].
    module = MTPModule(MODEL)
    reference.randomize(module)
    hidden, embedded = normal(1, 5, 32).detach(), 3 * normal(1, 5, 32, seed=4).detach()
    override_key, nothing = torch.eye(32), torch.zeros(32, 32)
    for halves, part, norm in (
        ([override_key, nothing], embedded, module.embedding_norm),
        ([nothing, override_key], hidden, module.hidden_norm),
    ):
        module.projection.weight.data = torch.cat(halves, dim=1)
        expected = [reference.rms_norm(norm, vector, MODEL.norm_eps) for vector in part[0]]
        assert_close(joined(module, hidden, embedded)[0], torch.stack(expected))


def test_tokens_move_ahead_by_the_depth() -> None:
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert shift_tokens(ids, 1)[:, :3].tolist() == [[2, 3, 4], [6, 7, 8]]
    assert shift_tokens(ids, 3)[:, :1].tolist() == [[4], [8]]


def test_padded_rows_wrap_around_behind_their_last_token() -> None:
    ids, lengths = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0], [8, 0, 0, 0], [0, 0, 0, 0]]), [4, 3, 1, 0]
    for depth in (1, 2, 3, 5):
        found = shift_tokens(ids, depth, torch.tensor(lengths))
        for row, expected, length in zip(found, ids, lengths, strict=True):
            assert torch.equal(row[:length], expected[:length].roll(-depth))
    assert torch.equal(shift_tokens(ids, 1, torch.tensor([4] * 4)), shift_tokens(ids, 1))
