"""data=mixture: rows of several sources in turn, one tokenizer, and held-out rows by source."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3.data import mixture_order
from dsv3.data.loader import DataLoader
from dsv3.data.mixture import HeldOutSources, MixtureData, PreparedMixture
from dsv3.data.packing import RowDataset
from dsv3.data.sources import TextData
from dsv3.errors import UserError
from dsv3.planning.batch_schedule import BatchSchedule
from dsv3.tokens.shard_index import TokenizerReference
from dsv3.tokens.tokenizer import Tokenizer, TrainedTokenizer
from dsv3.training.evaluation import rows_to_score
from tests.data.texts import sentence
from tests.data.token_formats import shards

LENGTH = 16


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture_order, "BLOCK", 32)


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Path]:
    """Return two folders of texts by name, of 20 and of 40 texts."""
    folders = {"code": tmp_path / "code", "web": tmp_path / "web"}
    for begin, (folder, count) in zip((0, 100), zip(folders.values(), (20, 40), strict=True), strict=True):
        folder.mkdir()
        for number in range(count):
            (folder / f"{number}.txt").write_text(sentence(begin + number))
    return folders


def mixture(texts: dict[str, Path], **options: Any) -> MixtureData:
    weights = {"code": 0.25, "web": [[0, 0.75], [64 * LENGTH, 0.25]]}
    sources = {
        name: {"source": "text", "path": str(path), "weight": weights[name]} for name, path in texts.items()
    }
    for name, more in options.pop("sources", {}).items():
        sources[name] = sources.get(name, {}) | more
    place = next(iter(texts.values())).parent / "cache"
    return MixtureData(sources, **{"held_out": 0.2, "cache_dir": str(place)} | options)


def rows_of(dataset: RowDataset | None, count: int) -> list[list[int]]:
    assert dataset is not None
    return [dataset.row(number).tokens.tolist() for number in range(count)]


def test_each_source_gives_its_own_rows_in_its_own_order_by_its_weight(
    texts: dict[str, Path], tokenizer: Tokenizer
) -> None:
    data = mixture(texts).prepare(tokenizer, LENGTH, 5)
    assert data.train is not None
    order = data.order
    for sample in range(300):
        source, number = order.locate(sample)
        own = list(data.sources.values())[source].train
        assert own is not None
        assert data.train.row(sample).tokens.tolist() == own.row(number).tokens.tolist()
    assert order.counts(64) == [16, 48]  # code and web, to where the weights change
    assert order.counts(64 + 320) == [16 + 160, 48 + 160]
    found = data.progress(64)
    length = {name: len(part.train or ()) for name, part in data.sources.items()}
    assert found == {
        "code": {"tokens": 16 * LENGTH, "epochs": 16 / length["code"]},
        "web": {"tokens": 48 * LENGTH, "epochs": 48 / length["web"]},
    }
    # Another source beside it leaves the rows of a source as they are.
    alone = mixture({"web": texts["web"]}).prepare(tokenizer, LENGTH, 5)
    assert rows_of(alone.sources["web"].train, 40) == rows_of(data.sources["web"].train, 40)


def test_the_batches_are_the_same_on_any_number_of_ranks_and_after_a_ramp(
    texts: dict[str, Path], tokenizer: Tokenizer
) -> None:
    train = mixture(texts).prepare(tokenizer, LENGTH, 5).train
    assert train is not None
    expected = [tokens[:-1] for tokens in rows_of(train, 96)]

    def step(first: int, world: int, size: int) -> list[list[int]]:
        loaders = [DataLoader(train, BatchSchedule(size), 1, rank, world) for rank in range(world)]
        batches = [batch for loader in loaders for batch in loader.microbatches(first)]
        return [tokens for batch in batches for tokens in batch.tokens.tolist()]

    for world in (1, 2, 4, 8):
        assert [row for first in range(0, 96, 8) for row in step(first, world, 8)] == expected
    assert step(0, 2, 32) + step(32, 8, 64) == expected


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_every_document_of_a_source_comes_once_in_each_of_its_epochs(
    texts: dict[str, Path], tokenizer: Tokenizer, packing: str
) -> None:
    data = mixture(texts, sources={"code": {"packing": packing}}).prepare(tokenizer, LENGTH, 5)
    code = data.sources["code"].train
    assert data.train is not None
    assert code is not None
    seen: dict[int, list[list[int]]] = {}
    for sample in range(64 + 32 * 60):
        source, number = data.order.locate(sample)
        if source == 0:
            epoch = number // len(code)
            seen.setdefault(epoch, []).append(data.train.row(sample).tokens.tolist())
    for epoch in range(3):
        expected = [code.row(epoch * len(code) + number).tokens.tolist() for number in range(len(code))]
        assert sorted(seen[epoch]) == sorted(expected)


def test_reopening_equals_preparing_and_reads_no_text(
    texts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = TrainedTokenizer(300)
    first = mixture(texts).prepare(source, LENGTH, 5)
    monkeypatch.setattr(TextData, "corpus", lambda self: pytest.fail("read"))
    again = mixture(texts).reopen(first.recipe, source, LENGTH, 5)  # type: ignore[arg-type]
    assert again.fingerprint == first.fingerprint
    assert again.tokenizer_fingerprint == first.tokenizer_fingerprint
    assert rows_of(again.train, 100) == rows_of(first.train, 100)
    assert rows_of(again.held_out, len(first.held_out)) == rows_of(first.held_out, len(first.held_out))


def test_one_tokenizer_is_trained_on_the_training_text_of_all_sources(texts: dict[str, Path]) -> None:
    (texts["code"] / "0.txt").write_text("zebra zebra zebra " * 50)
    (texts["web"] / "0.txt").write_text("quagga quagga quagga " * 50)
    parts = [TextData(str(path), held_out=0.01, cache_dir=str(path.parent / "c2")) for path in texts.values()]

    def training() -> Iterator[str]:
        for part in parts:
            yield from part.training_texts()[0]

    expected = TrainedTokenizer(300).prepare(training())
    found = mixture(texts, held_out=0.01).prepare(TrainedTokenizer(300), LENGTH, 5)
    assert found.tokenizer_fingerprint == expected.fingerprint()
    for name in ("code", "web"):
        assert found.sources[name].tokenizer_fingerprint == expected.fingerprint()
    for word in (" zebra", " quagga"):
        assert len(expected.encode(word)) < len(word)


def test_shards_bring_their_tokenizer_and_others_are_told_by_both_names(
    texts: dict[str, Path], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    def made(name: str, by: Tokenizer) -> dict[str, Any]:
        documents = [[*by.encode(sentence(number)), 1] for number in range(30)]
        place = shards(
            tmp_path / name,
            documents[2:],
            documents[:2],
            tokenizer=TokenizerReference(by.fingerprint(), "tokenizer"),
        )
        by.save(place / "tokenizer")
        return {"path": str(place), "weight": 1}

    books = made("books", tokenizer)
    data = mixture(texts, sources={"books": books}).prepare(TrainedTokenizer(300), LENGTH, 5)
    assert {part.tokenizer_fingerprint for part in data.sources.values()} == {tokenizer.fingerprint()}
    assert data.tokenizer is not None
    other = TrainedTokenizer(280).prepare(sentence(number) for number in range(50))
    with pytest.raises(UserError) as caught:
        mixture(texts, sources={"books": books, "papers": made("papers", other)}).prepare(
            TrainedTokenizer(300), LENGTH, 5
        )
    for words in ("data.sources.books", tokenizer.fingerprint(), "data.sources.papers", other.fingerprint()):
        assert words in str(caught.value)


def test_a_table_of_another_width_is_refused_with_the_length_that_works(
    texts: dict[str, Path], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    np.save(tmp_path / "table.npy", np.zeros((8, 9), np.int32))
    table = {"table": {"source": "tokens", "path": str(tmp_path / "table.npy"), "weight": 1}}
    with pytest.raises(UserError) as caught:
        mixture(texts, sources=table).prepare(tokenizer, LENGTH, 5)
    assert "data.sources.table" in str(caught.value)
    assert "train.sequence_length=8" in str(caught.value)
    data = mixture(texts, sources=table).prepare(tokenizer, 8, 5, evaluate=True)
    assert len(data.sources["table"].held_out) == 2  # the share that a run holds out, and not every row


def test_an_error_of_a_source_names_it(texts: dict[str, Path], tokenizer: Tokenizer, tmp_path: Path) -> None:
    gone = {"old": {"source": "text", "path": str(tmp_path / "gone"), "weight": 1}}
    with pytest.raises(UserError) as caught:
        mixture(texts, sources=gone).prepare(tokenizer, LENGTH, 5)
    assert str(caught.value).startswith("data.sources.old: ")
    assert "gone" in str(caught.value)


def test_held_out_rows_are_those_of_each_source_and_a_part_of_them_is_shared_by_size(
    texts: dict[str, Path], tokenizer: Tokenizer
) -> None:
    data = mixture(texts).prepare(tokenizer, LENGTH, 5)
    held_out = data.held_out
    assert isinstance(held_out, HeldOutSources)
    parts = [part.held_out for part in data.sources.values()]
    assert rows_of(held_out, len(held_out)) == [row for part in parts for row in rows_of(part, len(part))]
    for count in (2, 10, 41):
        some = rows_to_score(held_out, count * LENGTH)
        assert isinstance(some, HeldOutSources)
        sizes = {name: len(part) for name, part in some.sources.items()}
        assert sum(sizes.values()) == count
        assert sizes["code"] == pytest.approx(count * len(parts[0]) / len(held_out), abs=1)
    assert rows_to_score(held_out, None) is held_out
    one = rows_to_score(held_out, 1)
    assert isinstance(one, HeldOutSources)
    assert [len(part) for part in one.sources.values()] == [1, 1]  # no source goes unmeasured


def test_counts_are_those_of_all_sources_and_of_each(texts: dict[str, Path], tokenizer: Tokenizer) -> None:
    data = mixture(texts).prepare(tokenizer, LENGTH, 5)
    assert isinstance(data, PreparedMixture)
    for key in ("tokens_train", "documents_train", "rows_per_epoch", "tokens_held_out"):
        assert data.summary[key] == sum(data.summary[f"{name}.{key}"] for name in texts) > 0
    with pytest.raises(UserError, match=r"model\.vocab_size=100"):
        data.check_vocabulary(100)


def test_the_fingerprint_is_that_of_the_sources_and_what_they_hold_out(
    texts: dict[str, Path], tokenizer: Tokenizer
) -> None:
    prints = [
        mixture(texts, **options).prepare(tokenizer, LENGTH, 5).fingerprint
        for options in ({}, {"sources": {"web": {"weight": 3}}}, {"sources": {"web": {"held_out": 0.3}}})
    ]
    assert prints[0] == prints[1] != prints[2]
    (texts["web"] / "new.txt").write_text("more")
    assert mixture(texts).prepare(tokenizer, LENGTH, 5).fingerprint not in prints
