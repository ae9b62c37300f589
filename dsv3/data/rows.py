"""From documents to rows: what every data source is told, and the rows that it makes of a token store."""

from dataclasses import dataclass

import numpy as np

from dsv3.config.data import Packing
from dsv3.data.best_fit import BestFitDataset
from dsv3.data.fill_in_middle import FillInMiddle, FimTokens
from dsv3.data.packing import PackedDataset, PackedEvaluationDataset, RowDataset
from dsv3.errors import UserError
from dsv3.tokens.token_store import TokenStore
from dsv3.tokens.tokenizer import Tokenizer

SAMPLED_STRETCHES, SAMPLED_DOCUMENTS = 64, 1024
"""Stretches of documents, and documents of each, whose lengths are looked at to tell how many are cut."""


@dataclass(frozen=True)
class RowOptions:
    """The keys that all data sources have, as config/data.py describes them."""

    document_mask: bool = False
    held_out: float = 0.03
    shuffle: bool = True
    cache_dir: str | None = None
    packing: Packing = Packing.concat
    fim_rate: float = 0.0


def training_rows(
    store: TokenStore,
    options: RowOptions,
    sequence_length: int,
    seed: int,
    tokenizer: Tokenizer | None,
    fingerprint: str,
) -> tuple[RowDataset, dict[str, int]]:
    """Return the training rows of a store, and their counts for the summary of PreparedData.

    Args:
        tokenizer: has the ids of fill-in-the-middle.
        fingerprint: changes with the documents of the store; rows of best-fit packing are kept under it.

    Raises:
        UserError: there are too few tokens for one row, the tokenizer has no ids for fill-in-the-middle, or
            the cache cannot be written.
    """
    fim = None
    if options.fim_rate > 0:
        # Rows of best-fit packing are laid out once: the same documents have their 3 more tokens each time.
        anew = options.packing is Packing.concat
        fim = FillInMiddle(options.fim_rate, _fim_tokens(tokenizer), seed, every_epoch_anew=anew)
    counts = {"documents_train": store.num_documents, "tokens_train": store.num_tokens}
    if fim is not None:
        counts["documents_fim"] = fim.rearranged_before(store.num_documents)
    if options.packing is Packing.best_fit:
        seed_of_order = seed if options.shuffle else None
        best = BestFitDataset(store, sequence_length, seed_of_order, fim, options.cache_dir, fingerprint)
        counts |= {"rows_per_epoch": len(best), "tokens_left_out": 0}
        return best, counts | {"documents_cut": best.documents_cut, "tokens_padding": best.padding}
    rows = PackedDataset(store, sequence_length, seed, options.shuffle, fim)
    counts["rows_per_epoch"] = len(rows)
    counts["tokens_left_out"] = rows.num_tokens - 1 - len(rows) * sequence_length
    counts["documents_cut"] = expected_cuts(store, sequence_length)
    return rows, counts | {"tokens_padding": 0}


def held_out_rows(store: TokenStore, sequence_length: int) -> tuple[RowDataset, dict[str, int]]:
    """Return the held-out rows of a store, and their counts; documents stay whole and as they are."""
    counts = {"documents_held_out": store.num_documents, "tokens_held_out": store.num_tokens}
    return PackedEvaluationDataset(store, sequence_length), counts


def expected_cuts(store: TokenStore, sequence_length: int) -> int:
    """Return how many documents concat packing cuts in an epoch, on average over the places they may have.

    Rows share one token with the next. So a document of n tokens is whole in some row at all but n - 2 of the
    `sequence_length` places of its first token in a row. The lengths of up to SAMPLED_STRETCHES x
    SAMPLED_DOCUMENTS documents from all over the store are looked at, all of them where there are no more.
    """
    documents, stretches = store.num_documents, SAMPLED_STRETCHES
    cut = looked_at = 0.0
    for number in range(stretches):
        first, end = (documents * bound // stretches for bound in (number, number + 1))
        end = min(end, first + SAMPLED_DOCUMENTS)
        if first < end:
            lengths = np.diff(store.offsets(first, end))
            cut += float(np.clip((lengths - 2) / sequence_length, 0.0, 1.0).sum())
            looked_at += end - first
    return round(cut * documents / looked_at)


def _fim_tokens(tokenizer: Tokenizer | None) -> FimTokens:
    """Return the ids of fill-in-the-middle; UserError where there are none."""
    if tokenizer is None:
        raise UserError(
            "data.fim_rate: these ids come without a tokenizer: give it, tokenizer=local tokenizer.path=PATH"
        )
    ids = tokenizer.fim
    if ids is None:
        raise UserError(
            "data.fim_rate: the tokenizer has no tokens for fill-in-the-middle, such as <|fim_begin|>, "
            "<|fim_hole|> and <|fim_end|>: use data.fim_rate=0 or another tokenizer"
        )
    return FimTokens(*ids, bos=tokenizer.bos if tokenizer.add_bos else None, eos=tokenizer.eos)
