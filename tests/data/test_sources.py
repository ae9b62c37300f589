"""From a data source to rows: nothing held out leaks, nothing is prepared twice, mistakes are named."""

from pathlib import Path

import pytest

from dsv3.data.corpus import HeldOutSplit, TextCorpus
from dsv3.data.packing import PackedDataset
from dsv3.data.sources import PreparedData, StdlibData, TextData
from dsv3.data.token_file import read_token_file
from dsv3.data.tokenizer import Tokenizer, TrainedTokenizer
from dsv3.errors import UserError
from tests.data.texts import sentence


def source(folder: Path, **options: object) -> TextData:
    options = {"path": str(folder), "cache_dir": str(folder.parent / "cache"), "held_out": 0.2} | options
    return TextData(**options)  # type: ignore[arg-type]


def prepare(folder: Path, **options: object) -> PreparedData:
    return source(folder, **options).prepare(TrainedTokenizer(300), 32, 1)


def texts(prepared: PreparedData, directory: Path) -> list[str]:
    file, tokenizer = read_token_file(directory), prepared.tokenizer
    assert tokenizer is not None
    return [
        tokenizer.decode(file.tokens[begin:end].tolist())
        for begin, end in zip(file.offsets, file.offsets[1:], strict=False)
    ]


def test_nothing_held_out_is_in_the_training_file(folder: Path) -> None:
    prepared = prepare(folder)
    (train,) = (folder.parent / "cache").glob("tokens-*-train")
    (held_out,) = (folder.parent / "cache").glob("tokens-*-held_out")
    train_texts, held_out_texts = texts(prepared, train), texts(prepared, held_out)
    assert len(set(train_texts)) == len(train_texts)  # no content twice
    assert not any(text in whole for text in held_out_texts for whole in ("".join(train_texts),))
    assert sorted(train_texts + held_out_texts) == sorted(sentence(number) for number in range(120))


def test_the_tokenizer_learns_from_the_training_side_only(folder: Path, tmp_path: Path) -> None:
    prepared = prepare(folder)
    split = HeldOutSplit(TextCorpus(str(folder)), 0.2)
    alone = TrainedTokenizer(300).prepare(document.text for document in split.training())
    both = TrainedTokenizer(300).prepare(document.text for document in TextCorpus(str(folder)).documents())
    assert prepared.tokenizer is not None
    assert prepared.tokenizer.fingerprint() == alone.fingerprint() != both.fingerprint()


def test_the_summary_counts_what_is_there(folder: Path) -> None:
    (folder / "picture").write_bytes(b"\xff")
    prepared = prepare(folder)
    assert isinstance(prepared.train, PackedDataset)
    counts = prepared.summary
    assert (counts["duplicates_dropped"], counts["files_skipped"], counts["vocabulary"]) == (3, 1, 300)
    assert counts["documents_train"] + counts["documents_held_out"] == 120
    assert counts["rows_per_epoch"] == len(prepared.train) == (counts["tokens_train"] - 1) // 32
    assert len(prepared.held_out) == -(-(counts["tokens_held_out"] - 1) // 32)
    assert prepared.fingerprint == TextCorpus(str(folder)).fingerprint()
    assert prepared.sequence_length == 32


def test_a_second_time_comes_from_the_cache_and_a_change_does_not(folder: Path) -> None:
    cache = folder.parent / "cache"
    first = prepare(folder)
    entries = sorted(cache.iterdir())
    again = prepare(folder)
    assert sorted(cache.iterdir()) == entries
    assert again.summary == first.summary
    (folder / "new.txt").write_text("something new")
    assert prepare(folder).fingerprint != first.fingerprint
    assert len(list(cache.glob("tokens-*"))) == 4
    prepare(folder, held_out=0.3)
    assert len(list(cache.glob("tokens-*"))) == 6
    source(folder).prepare(TrainedTokenizer(290), 32, 1)
    assert len(list(cache.glob("tokens-*"))) == 8


def test_options_reach_the_rows(folder: Path, tokenizer: Tokenizer) -> None:
    def first_row(seed: int, shuffle: bool) -> list[int]:
        train = source(folder, shuffle=shuffle).prepare(tokenizer, 32, seed).train
        assert train is not None
        return train.row(0).tokens.tolist()  # type: ignore[no-any-return]

    assert first_row(1, True) == first_row(1, True) != first_row(2, True)
    assert first_row(1, False) == first_row(2, False)
    assert source(folder, document_mask=True).document_mask


def test_evaluation_prepares_the_held_out_side_alone_with_the_given_tokenizer(
    folder: Path, tokenizer: Tokenizer
) -> None:
    prepared = source(folder).prepare(tokenizer, 32, 1, evaluate=True)
    assert prepared.train is None
    assert prepared.tokenizer is tokenizer
    assert [path.name.split("-")[-1] for path in (folder.parent / "cache").glob("tokens-*")] == ["held_out"]
    trained = source(folder).prepare(tokenizer, 32, 2)
    assert len(trained.held_out) == len(prepared.held_out)
    assert trained.held_out.row(0).tokens.tolist() == prepared.held_out.row(0).tokens.tolist()


def test_one_file_is_enough(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("".join(sentence(number) for number in range(30)))
    prepared = TextData(path=str(tmp_path / "book.txt"), cache_dir=str(tmp_path / "cache")).prepare(
        TrainedTokenizer(300), 64, 0
    )
    assert prepared.summary["documents_train"] == prepared.summary["documents_held_out"] == 1
    assert prepared.summary["tokens_held_out"] < 0.06 * prepared.summary["tokens_train"]


def test_a_vocabulary_larger_than_the_models_is_refused(folder: Path) -> None:
    prepared = prepare(folder)
    prepared.check_vocabulary(300)
    with pytest.raises(UserError, match=r"300 ids, model\.vocab_size=299"):
        prepared.check_vocabulary(299)


def test_mistakes_are_named(folder: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"data\.path is not set"):
        TextData()
    with pytest.raises(UserError, match=r"data\.cache_dir="):
        prepare(folder, cache_dir=str(folder / "000.txt"))
    with pytest.raises(UserError, match=r"train\.sequence_length=100000"):
        source(folder).prepare(tokenizer, 100_000, 1)


@pytest.mark.slow
def test_the_standard_library_trains_a_model_of_4096_ids(tmp_path: Path) -> None:
    data = StdlibData(cache_dir=str(tmp_path))
    prepared = data.prepare(TrainedTokenizer(4096), 512, 1)
    assert prepared.summary["vocabulary"] == 4096
    assert prepared.summary["tokens_train"] > 1e6
    assert 0.005 < prepared.summary["tokens_held_out"] / prepared.summary["tokens_train"] < 0.1
