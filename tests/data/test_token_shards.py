"""data=shards: every kind of token files gives every token once, and nothing damaged is read in silence."""

import json
import pickle
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dsv3.config.data import IdType, Verify
from dsv3.data import token_shards
from dsv3.data.batch import collate
from dsv3.data.loader import evaluation_batches
from dsv3.data.mixture import MixtureData
from dsv3.data.token_shards import PreparedShards, ShardsData, ShardsRecipe
from dsv3.errors import UserError
from dsv3.model.head import IGNORE_INDEX
from dsv3.tokens import document_index, token_store
from dsv3.tokens.background_check import BACKGROUND
from dsv3.tokens.cache import CacheEntryError
from dsv3.tokens.file_array import FileArray
from dsv3.tokens.megatron_files import open_megatron
from dsv3.tokens.shard_index import ShardIndex, TokenizerReference
from dsv3.tokens.token_store import TokenStore
from dsv3.tokens.tokenizer import LocalTokenizer, Tokenizer, TrainedTokenizer
from tests.data import token_formats as formats

EOS = 9

DOCUMENTS = [[*range(20 * n + 10, 20 * n + 10 + length), EOS] for n, length in enumerate((5, 1, 12, 0, 3, 8))]
"""No id but EOS occurs twice."""


def prepare(path: Path, length: int = 4, evaluate: bool = False, **options: Any) -> PreparedShards:
    tokenizer = options.pop("tokenizer", TrainedTokenizer(300))
    given: dict[str, Any] = {"path": str(path), "dtype": IdType.uint16} | options
    return ShardsData(**given).prepare(tokenizer, length, 1, evaluate)


def documents(store: TokenStore) -> list[list[int]]:
    """Return the ids of every document."""
    return [
        store.read(a, b - a).tolist() for a, b in pairwise(store.offsets(0, store.num_documents).tolist())
    ]


def sides(prepared: PreparedShards) -> list[list[list[int]]]:
    """Return the documents of the held-out side, and of the training side where there is one."""
    return [documents(store) for store in prepared.stores]


@pytest.mark.parametrize("kind", formats.INDEXED)
def test_documents_come_out_as_they_went_in(tmp_path: Path, kind: str) -> None:
    path = formats.INDEXED[kind](tmp_path / "data", DOCUMENTS)
    (scored,) = sides(prepare(path, evaluate=True))
    assert scored == DOCUMENTS
    held_out, train = sides(prepare(path, held_out=0.2))
    assert sorted(held_out + train) == sorted(DOCUMENTS)
    assert held_out
    assert train


@pytest.mark.parametrize("kind", formats.FLAT)
def test_flat_files_are_one_document_or_are_cut_behind_an_id(tmp_path: Path, kind: str) -> None:
    path = formats.FLAT[kind](tmp_path / "data", DOCUMENTS)
    (scored,) = sides(prepare(path, evaluate=True))
    assert scored == [[i for ids in DOCUMENTS for i in ids]]
    cached: dict[str, Any] = {"eos_id": EOS, "cache_dir": str(tmp_path / "cache")}
    (scored,) = sides(prepare(path, evaluate=True, **cached))
    assert scored == DOCUMENTS
    entry = next((tmp_path / "cache").glob("documents-*/*.i8"))
    entry.write_bytes(entry.read_bytes()[:-8])  # damaged: it is made anew
    assert sides(prepare(path, evaluate=True, **cached)) == [DOCUMENTS]


def test_the_last_document_needs_no_end_and_a_scan_goes_on_where_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_index, "CHUNK", 3)
    for number in range(3):
        formats.raw(tmp_path / f"{number}", [*DOCUMENTS, [7, 8]])
    cached: dict[str, Any] = {"eos_id": EOS, "cache_dir": str(tmp_path / "cache")}
    written, write = [], document_index._write

    def killed(path: Path, *rest: Any) -> None:
        written.append(path.name)
        if len(written) == 2:
            raise KeyboardInterrupt
        write(path, *rest)

    monkeypatch.setattr(document_index, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path, evaluate=True, **cached)
    monkeypatch.setattr(document_index, "_write", write)
    scanned, scan = [], document_index._scanned

    def noted(array: FileArray, *rest: Any) -> Any:
        scanned.append(array.path)
        return scan(array, *rest)

    monkeypatch.setattr(document_index, "_scanned", noted)
    (scored,) = sides(prepare(tmp_path, evaluate=True, **cached))
    assert scored == 3 * [*DOCUMENTS, [7, 8]]
    assert [Path(name).name for name in scanned] == ["1.bin", "2.bin"]


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "uint16"])
def test_megatrons_dtypes_and_documents_of_several_sequences(tmp_path: Path, dtype: str) -> None:
    few = [[i % 100 for i in ids] for ids in DOCUMENTS]
    formats.megatron(tmp_path / "data", few, dtype, sequences=3)
    for name in ("data", "data.bin", "data.idx"):  # the prefix is what Megatron's own options take
        assert sides(prepare(tmp_path / name, evaluate=True)) == [few]


def test_a_folder_holds_files_of_several_kinds_in_the_order_of_their_names(tmp_path: Path) -> None:
    formats.megatron(tmp_path / "a", DOCUMENTS[:2])
    formats.raw(tmp_path / "b", DOCUMENTS[2:3])
    formats.shards(tmp_path / "c", DOCUMENTS[3:], files=3)
    (tmp_path / "meta.pkl").write_bytes(b"no ids")
    (tmp_path / ".hidden.bin").write_bytes(b"none either")
    assert sides(prepare(tmp_path, evaluate=True)) == [DOCUMENTS]
    assert sides(prepare(tmp_path / "[bc]*", evaluate=True)) == [DOCUMENTS[2:]]
    told = prepare(tmp_path).told
    assert told[0] == "1 file of Megatron-LM and 1 file flat, uint16 and 3 files of token shards"


def test_what_files_mark_is_held_out_and_never_trained_on(tmp_path: Path) -> None:
    formats.raw(tmp_path / "fineweb_train_000001", DOCUMENTS[:2])
    formats.raw(tmp_path / "fineweb_val_000000", DOCUMENTS[2:3])
    flat = [[i for ids in part for i in ids] for part in (DOCUMENTS[2:3], DOCUMENTS[:2])]
    assert sides(prepare(tmp_path)) == [[ids] for ids in flat]
    assert sides(prepare(tmp_path, evaluate=True)) == [[flat[0]]]
    assert "fineweb_val_000000.bin" in prepare(tmp_path).told[1]
    # alone it is what was asked for
    assert sides(prepare(tmp_path / "fineweb_val_000000.bin", evaluate=True)) == [[flat[0]]]
    given: dict[str, Any] = {"held_out_path": str(tmp_path / "fineweb_val_000000.bin")}
    assert sides(prepare(tmp_path / "fineweb_train_000001.bin", **given)) == [[ids] for ids in flat]
    path = formats.shards(tmp_path / "own", DOCUMENTS[:3], DOCUMENTS[3:])
    assert sides(prepare(path)) == [DOCUMENTS[3:], DOCUMENTS[:3]]
    only = formats.shards(tmp_path / "only", [], DOCUMENTS)
    with pytest.raises(UserError, match="nothing to train on"):
        prepare(only)


@given(
    # A fifth is held out, in whole documents: a row is left to train on, or refused.
    st.lists(st.integers(0, 30), min_size=2, max_size=30).filter(lambda n: 0.8 * sum(n) - max(n) > 10),
    st.sampled_from(["megatron", "shards", "npy"]),
    st.integers(1, 8),
    st.booleans(),
)
@example([1, 19, 22], "megatron", 1, False)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_token_of_every_document_is_read_once_an_epoch(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], kind: str, length: int, seven: bool
) -> None:
    """In the order of the files rows are the stream; shuffled they hold the same tokens."""
    folder = tmp_path_factory.mktemp("data")
    bounds = np.cumsum([0, *lengths])
    texts = [list(range(a, b)) for a, b in pairwise(bounds.tolist())]
    write = formats.INDEXED.get(kind) or formats.FLAT[kind]
    parts = [texts[len(texts) * n // 7 : len(texts) * (n + 1) // 7] for n in range(7)] if seven else [texts]
    for number, part in enumerate(parts):
        if sum(map(len, part)):
            write(folder / f"{number}", part)
    for shuffle in (False, True):
        try:
            prepared = prepare(folder, length, held_out=0.2, shuffle=shuffle)
        except UserError as error:  # of a few long documents nearly all may be held out
            needed, left = map(
                int, re.findall(r"needs (\d+) tokens, the training data has (\d+)", str(error))[0]
            )
            assert left < needed == length + 1
            return
        held_out, train = prepared.stores
        scored = held_out.read(0, held_out.num_tokens).tolist()
        assert sorted(scored + train.read(0, train.num_tokens).tolist()) == list(range(bounds[-1]))
        assert prepared.train is not None
        rows = [prepared.train.row(number).tokens for number in range(len(prepared.train))]
        read = np.concatenate([rows[0], *(row[1:] for row in rows[1:])]) if not shuffle else None
        targets = np.concatenate([row[1:] for row in rows])
        assert len(set(targets.tolist())) == len(targets) == len(rows) * length
        assert not set(targets.tolist()) & set(scored)
        if read is not None:
            assert read.tolist() == train.read(0, len(read)).tolist()
        assert 0 <= train.num_tokens - 1 - len(targets) < length


def test_one_file_and_seven_give_the_same_rows(tmp_path: Path) -> None:
    one, seven = (formats.shards(tmp_path / str(n), 9 * DOCUMENTS, files=n) for n in (1, 7))
    first, second = (prepare(path, held_out=0.1).train for path in (one, seven))
    assert first is not None
    assert second is not None
    for index in range(150):
        assert first.row(index).tokens.tolist() == second.row(index).tokens.tolist()


def test_another_process_reads_it_without_opening_the_files_again(tmp_path: Path) -> None:
    path = formats.shards(tmp_path / "data", DOCUMENTS[:4], DOCUMENTS[4:], files=3)
    first = prepare(path)
    recipe = pickle.loads(pickle.dumps(first.recipe))
    for name in ("index.json", *(f"train-0000{n}.offsets.npy" for n in range(2))):
        (path / name).rename(tmp_path / name)
    data = ShardsData(path=str(path))
    with pytest.raises(CacheEntryError, match="offsets"):
        data.reopen(recipe, None, 4, 1)
    for n in range(2):
        name = f"train-0000{n}.offsets.npy"
        (tmp_path / name).rename(path / name)
    again = data.reopen(recipe, None, 4, 1)
    assert (again.fingerprint, again.summary, sides(again)) == (
        first.fingerprint,
        first.summary,
        sides(first),
    )
    (path / "train-00002.tokens.npy").write_bytes(b"")
    with pytest.raises(CacheEntryError, match="cut off"):
        data.reopen(recipe, None, 4, 1)


def test_the_fingerprint_and_the_record_follow_the_contents_not_the_names(tmp_path: Path) -> None:
    prints = [prepare(formats.megatron(tmp_path / "a", DOCUMENTS))]
    prints.append(prepare(formats.megatron(tmp_path / "b", DOCUMENTS)))
    changed = [DOCUMENTS[0], *([i + 1 for i in ids] for ids in DOCUMENTS[1:])]
    prints.append(prepare(formats.megatron(tmp_path / "c", changed)))
    prints.append(prepare(formats.megatron(tmp_path / "d", [DOCUMENTS[0] + DOCUMENTS[1], *DOCUMENTS[2:]])))
    found = [p.fingerprint for p in prints]
    assert found[0] == found[1]
    assert len(set(found)) == 3
    records = [p.record for p in prints]
    assert records[0] is not None
    assert [r and r.layout == records[0].layout for r in records] == [True, True, True, False]
    # What evaluation opens, the held-out side alone, has the fingerprint of the whole.
    path = formats.shards(tmp_path / "own", DOCUMENTS[:3], DOCUMENTS[3:])
    assert prepare(path).fingerprint == prepare(path, evaluate=True).fingerprint


def read_all(prepared: PreparedShards) -> None:
    """Read every training row."""
    assert prepared.train is not None
    for index in range(len(prepared.train)):
        prepared.train.row(index)


def tokenizer_of(path: Path, size: int = 300) -> Tokenizer:
    tokenizer = TrainedTokenizer(size).prepare(
        ["some text to learn from, and some more of it", "def f(x): pass"]
    )
    tokenizer.save(path)
    return tokenizer


def test_the_tokenizer_is_that_of_the_shards_and_no_other(tmp_path: Path) -> None:
    path = formats.shards(tmp_path / "own", DOCUMENTS)
    own = tokenizer_of(path / "tokenizer", 270)
    index = ShardIndex.read(path)
    reference = TokenizerReference(own.fingerprint(), "tokenizer")
    ShardIndex(index.dtype_name, index.splits, own.size, tokenizer=reference).write(path)
    first = prepare(path)
    assert first.tokenizer is not None
    assert first.tokenizer_fingerprint == own.fingerprint()
    assert isinstance(first.recipe, ShardsRecipe)
    again = ShardsData(path=str(path)).reopen(first.recipe, TrainedTokenizer(300), 4, 1)
    assert again.tokenizer_fingerprint == own.fingerprint()
    assert prepare(path, tokenizer=LocalTokenizer(str(path / "tokenizer"))).tokenizer is not None
    assert prepare(path, tokenizer=own).tokenizer is own
    tokenizer_of(tmp_path / "other", 268)
    other = LocalTokenizer(str(tmp_path / "other"))
    for another in (other, other.prepare()):
        with pytest.raises(
            UserError, match=f"ids of the tokenizer {own.fingerprint()}, and .* mean other texts"
        ):
            prepare(path, tokenizer=another)
    with pytest.raises(UserError, match=rf"of {own.size} ids, model\.vocab_size=100|{own.size} ids"):
        first.check_vocabulary(100)
    # Two directories of two tokenizers are none of one data.
    second = formats.shards(tmp_path / "second", DOCUMENTS, tokenizer=TokenizerReference("feed", None))
    with pytest.raises(UserError, match=r"second holds ids of the tokenizer feed|of feed"):
        prepare(tmp_path)
    assert prepare(second).tokenizer is None
    (tmp_path / "m").mkdir()
    megatron = formats.megatron(tmp_path / "m" / "x", DOCUMENTS)
    assert prepare(megatron, tokenizer=other).tokenizer is not None


def test_ids_outside_the_vocabulary_are_named_at_start_or_when_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = formats.raw(tmp_path / "ids", [[*range(90), 120, *(i % 99 for i in range(400))]])
    prepared = prepare(path, held_out=0.01)
    with pytest.raises(UserError, match=r"ids\.bin: token 90 is the id 120, .* 0 to 99 .*vocab_size=100"):
        prepared.check_vocabulary(100)
    path = formats.raw(tmp_path / "ids", [[*(i % 99 for i in range(495)), 121, *range(5)]])
    # Of much data a part is looked at when a run starts; a row of what is not says it when it is read.
    monkeypatch.setattr(token_shards, "CHECKED_TOKENS", 20)
    monkeypatch.setattr(token_store, "CHECKED_TOGETHER", 10)
    prepared = prepare(path, held_out=0.01)
    prepared.check_vocabulary(121, share=(0, 4))
    with pytest.raises(UserError, match="token 495 is the id 121"):
        read_all(prepared)
    with pytest.raises(UserError, match="is the id 121"):
        prepare(path, held_out=0.01, verify=Verify.all).check_vocabulary(121)


def test_ids_beyond_what_an_index_tells_are_named_whatever_the_model_takes(tmp_path: Path) -> None:
    """Each directory by its own index, in a folder and in a mixture; the size it tells is bounded."""
    (tmp_path / "both").mkdir()
    wide = formats.shards(tmp_path / "both" / "wide", [[3000, *range(9)]], DOCUMENTS, vocab_size=4000)
    prepare(wide).check_vocabulary(5000)
    wrong = formats.shards(tmp_path / "both" / "wrong", [[5, 6, 3000, 7, 8]], DOCUMENTS, vocab_size=1000)
    told = r"wrong/train-00000\.tokens\.npy: token 2 is the id 3000, .* index\.json says vocab_size=1000"
    for path in (wrong, tmp_path / "both"):
        with pytest.raises(UserError, match=told):
            prepare(path).check_vocabulary(5000)
    with pytest.raises(UserError, match=told):
        read_all(prepare(wrong))
    sources = {name: {"path": str(tmp_path / "both" / name), "weight": 1} for name in ("wide", "wrong")}
    mixture = MixtureData(sources).prepare(TrainedTokenizer(300), 4, 1)
    with pytest.raises(UserError, match=told):
        mixture.check_vocabulary(5000)
    index = json.loads((wrong / "index.json").read_text())
    (wrong / "index.json").write_text(json.dumps(index | {"vocab_size": 10**30}))
    with pytest.raises(UserError, match=r"index\.json is damaged: vocab_size=10+, .* at most 16,777,216"):
        prepare(wrong)


def test_digests_are_compared_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = formats.with_digests(formats.shards(tmp_path / "own", DOCUMENTS, files=2))
    prepare(path, verify=Verify.all).check_digests()
    tokens = path / "train-00001.tokens.npy"
    content = bytearray(tokens.read_bytes())
    content[-2] ^= 1  # another id of the vocabulary
    tokens.write_bytes(content)
    prepare(path).check_vocabulary(1000)
    monkeypatch.setattr(token_shards, "AT_START", 0)
    prepare(path).check_digests()  # later, in the background
    BACKGROUND.reset()
    with pytest.raises(UserError, match=r"train-00001\.tokens\.npy has the digest"):
        prepare(path, verify=Verify.all).check_digests()

    changed = tokens.stat().st_mtime
    prepare(path).verify_newer(changed)
    with pytest.raises(UserError, match=r"train-00001\.tokens\.npy has the digest"):
        prepare(path).verify_newer(changed - 1)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda p: (p / "train-00000.tokens.npy").unlink(), "train-00000.tokens.npy does not exist"),
        (lambda p: cut(p / "train-00000.tokens.npy", 1), "train-00000.tokens.npy is cut off"),
        (lambda p: cut(p / "train-00000.offsets.npy", 8), "train-00000.offsets.npy is cut off"),
        (lambda p: (p / "train-00000.offsets.npy").write_bytes(b""), "offsets.npy is empty"),
        (lambda p: np.save(p / "train-00000.tokens.npy", np.zeros(35, np.int32)), "holds int32 .* uint16"),
        (lambda p: np.save(p / "train-00000.tokens.npy", np.zeros(3, np.uint16)), r"holds uint16 \[3\]"),
        (lambda p: offsets(p, [0, 4, 3]), r"document 2 begins at token 3, the one before at 4"),
        (lambda p: offsets(p, [0, 10**9]), r"document 1 begins at token 1000000000"),
        (lambda p: offsets(p, [0, -2]), r"document 1 begins at token -2"),
        (lambda p: offsets(p, [2]), r"spans the tokens 2 to 35"),
        (lambda p: cut(p / "index.json", 9), r"index\.json is damaged"),
        (lambda p: (p / "index.json").unlink(), "holds token shards without their index.json"),
    ],
)
def test_shards_that_do_not_fit_their_index_are_refused(tmp_path: Path, spoil: Any, words: str) -> None:
    path = formats.shards(tmp_path / "own", DOCUMENTS)
    spoil(path)
    with pytest.raises(UserError, match=words):
        prepare(path, evaluate=True).check_vocabulary(1000)


def cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


def offsets(path: Path, begin: list[int]) -> None:
    found = np.load(path / "train-00000.offsets.npy")
    found[: len(begin)] = begin
    np.save(path / "train-00000.offsets.npy", found)


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (b"", {}, "is empty"),
        (bytes(7), {}, r"7 bytes, no multiple of the 2 of data\.dtype=uint16"),
        (
            bytes(range(8)),
            {"dtype": None},
            r"no header: .*data\.dtype=uint16 or uint32 \(.*look like uint16\)",
        ),
        (np.arange(1, 99, dtype="<u4").tobytes(), {"dtype": None}, "look like uint32"),
        (np.arange(1, 99, dtype="<u4").tobytes(), {}, r"every other id would be 0 .*use data\.dtype=uint32"),
        (b"\x1f\x8b" + bytes(60), {"dtype": None}, "compressed"),
        (b"LITPKDS" + bytes(17), {}, "version 0"),
        (b"LITPKDS" + bytes(5), {}, "is cut off"),
        (np.array([20240520, 1, 9], "<i4").tobytes() + bytes(1000), {}, "is cut off"),
        (np.array([20240520, 1, 9, *([0] * 253)], "<i4").tobytes() + bytes(16), {}, "9 ids of uint16 end at"),
    ],
)
def test_flat_files_that_are_none_are_refused(
    tmp_path: Path, content: bytes, options: dict[str, Any], words: str
) -> None:
    (tmp_path / "ids.bin").write_bytes(content)
    with pytest.raises(UserError, match=rf"ids\.bin.*{words}"):
        prepare(tmp_path / "ids.bin", **options)


def test_places_that_hold_no_ids_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path / "*.bin"):
        with pytest.raises(
            UserError, match=r"data\.path=.* does not exist: give a directory that task=prepare"
        ):
            prepare(path)
    with pytest.raises(UserError, match=r"holds no \.bin, \.idx or \.npy file"):
        prepare(tmp_path)
    np.save(tmp_path / "table.npy", np.zeros((3, 4), np.int32))
    with pytest.raises(UserError, match=r"table\.npy holds int32 \[3, 4\]: .* read by data=tokens"):
        prepare(tmp_path / "table.npy")
    formats.npy(tmp_path / "a", DOCUMENTS, "int64")
    formats.npy(tmp_path / "b", DOCUMENTS, "int32")
    with pytest.raises(UserError, match=r"a\.npy holds int64 and .*b\.npy int32"):
        prepare(tmp_path / "[ab].npy")
    with pytest.raises(UserError, match=r"data\.path is not set"):
        ShardsData()


def test_an_index_of_megatrons_that_contradicts_its_bin_is_refused(tmp_path: Path) -> None:
    path = formats.megatron(tmp_path / "data", DOCUMENTS)
    index = path.with_suffix(".idx")
    whole = index.read_bytes()

    def told(content: bytes) -> str:
        index.write_bytes(content)
        with pytest.raises(UserError) as caught:
            TokenStore([open_megatron(index)]).check()
        assert str(tmp_path / "data") in str(caught.value)
        return str(caught.value)

    sizes = 34
    swapped = (
        whole[: sizes + 4]
        + whole[sizes + 8 : sizes + 12]
        + whole[sizes + 4 : sizes + 8]
        + whole[sizes + 12 :]
    )
    assert "sequence 1 begins at 12" in told(swapped)
    assert "cut off" in told(whole[:-1])
    assert "it is cut off or damaged" in told(whole + b"\0")
    assert "dtype code 7, floats" in told(whole[:17] + b"\x07" + whole[18:])
    assert "version 2" in told(whole[:9] + b"\x02" + whole[10:])
    assert "begins with" in told(b"x" + whole[1:])
    index.write_bytes(whole)
    path.write_bytes(path.read_bytes()[:-2])
    assert "one of them is cut off" in told(whole)
    path.unlink()
    assert "data.bin does not exist" in told(whole)


KINDS = {**formats.INDEXED, **formats.FLAT}


@given(st.sampled_from(sorted(KINDS)), st.integers(0, 5), st.booleans(), st.integers(0, 10**6))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_cut_and_no_flipped_bit_of_a_header_ends_in_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, kind: str, which: int, is_cut: bool, place: int
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    KINDS[kind](folder / "data", DOCUMENTS)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    file = files[which % len(files)]
    content = bytearray(file.read_bytes())
    if is_cut:
        del content[place % len(content) :]
    else:
        content[place // 8 % min(len(content), 300)] ^= 1 << place % 8
    file.write_bytes(content)
    told = ""
    try:
        prepared = prepare(folder, held_out=0.2, cache_dir=str(folder))
        prepared.check_vocabulary(200)
        read_all(prepared)
    except UserError as error:
        told = str(error)
    assert not told or str(folder) in told or told.startswith("train.sequence_length=4 needs")
    assert len(told) < 600


def test_evaluation_counts_the_targets_within_documents(tmp_path: Path) -> None:
    prepared = prepare(formats.megatron(tmp_path / "x", DOCUMENTS), 4, evaluate=True)
    assert prepared.train is None
    targets = np.concatenate([b.targets.numpy() for b in evaluation_batches(prepared.held_out, 3)])
    assert sorted(targets[targets != IGNORE_INDEX]) == sorted(i for ids in DOCUMENTS for i in ids[1:])
    assert collate([prepared.held_out.row(0)]).tokens.shape == (1, 4)
