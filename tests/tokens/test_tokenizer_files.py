"""Files beside a tokenizer's ids: special tokens, what begins and ends a text; kinds that are not read."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from dsv3.errors import UserError
from dsv3.tokens.document_encoder import document_ends
from dsv3.tokens.tokenizer import BOS, EOS, LocalTokenizer, Tokenizer, TrainedTokenizer
from dsv3.tokens.tokenizer_files import has_tokenizer, read_stop_ids
from tests.data.texts import sentence

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7847602\n"


def save(tokenizer: Tokenizer, folder: Path, **files: Any) -> Path:
    """Write a bare tokenizer.json, and files beside it: values as JSON, texts as they are."""
    tokenizer.save(folder)
    for path in folder.iterdir():
        if path.name != "tokenizer.json":
            path.unlink()
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.json").write_text(text, "utf-8")
    return folder


def test_special_tokens_map_and_added_tokens_count_where_the_config_lists_no_added_tokens(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    names = {"bos_token": "<|fim_hole|>", "eos_token": {"content": "<new>"}, "pad_token": "<more>"}
    added = {"<more>": tokenizer.size + 1, "<new>": tokenizer.size}
    folder = save(tokenizer, tmp_path / "a", special_tokens_map=names, added_tokens=added)
    loaded = Tokenizer.from_file(folder)
    assert (loaded.bos, loaded.eos, loaded.pad) == (4, tokenizer.size, tokenizer.size + 1)
    assert loaded.size == tokenizer.size + 2
    assert loaded.decode([5, tokenizer.size]) == ""
    assert all(5 < index < tokenizer.size for index in loaded.encode("a<new>"))
    listed = {"eos_token": EOS, "added_tokens_decoder": {"1": {"content": EOS, "special": True}}}
    folder = save(tokenizer, tmp_path / "b", special_tokens_map=names, tokenizer_config=listed)
    assert Tokenizer.from_file(folder).eos == 1


def test_added_tokens_with_ids_of_another_tokenizer_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for added in ({"<new>": tokenizer.size + 5}, {EOS: 7}):
        with pytest.raises(UserError, match="they are of two tokenizers"):
            Tokenizer.from_file(save(tokenizer, tmp_path, added_tokens=added))


@pytest.mark.parametrize(
    ("files", "stop"),
    [
        ({}, (1,)),
        ({"generation_config": {"eos_token_id": 5}}, (1, 5)),
        ({"generation_config": {"eos_token_id": [5, 1, 4]}, "config": {"eos_token_id": 3}}, (1, 5, 4)),
        ({"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": 3}}, (1,)),
        ({"config": {"eos_token_id": [3, 2]}}, (1, 3, 2)),
        ({"generation_config": {}, "config": {"eos_token_id": [3, 2]}}, (1, 3, 2)),
    ],
)
def test_every_id_that_the_files_name_ends_a_generated_text(
    tokenizer: Tokenizer, tmp_path: Path, files: dict[str, Any], stop: tuple[int, ...]
) -> None:
    loaded = Tokenizer.from_file(save(tokenizer, tmp_path, **files))
    assert (loaded.eos, loaded.stop) == (1, stop)


@pytest.mark.parametrize("told", ["</s>", -1, [1, "2"], 1.5, True])
def test_an_eos_id_that_is_none_is_refused_by_file_and_value(tmp_path: Path, told: object) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": told}))
    with pytest.raises(
        UserError, match=r"generation_config\.json: eos_token_id=.* is neither an id nor a list"
    ):
        read_stop_ids(tmp_path)


@pytest.mark.parametrize(
    ("config", "adds"), [(None, True), ({"add_bos_token": False}, False), ({"add_bos_token": True}, True)]
)
def test_texts_begin_with_bos_as_the_file_says_and_documents_end_with_eos(
    tokenizer: Tokenizer, tmp_path: Path, config: dict[str, Any] | None, adds: bool
) -> None:
    files = {} if config is None else {"tokenizer_config": config | {"add_eos_token": False}}
    loaded = Tokenizer.from_file(save(tokenizer, tmp_path, **files))
    assert document_ends(loaded) == ([0] if adds else [], [1])
    assert loaded.document == f"{f'{BOS} ' if adds else ''}text {EOS}"
    assert loaded.add_bos is adds
    assert (loaded.fingerprint() == tokenizer.fingerprint()) is adds


def test_without_a_word_in_the_config_the_post_processor_says_whether_bos_begins_a_text(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    file = save(tokenizer, tmp_path) / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"post_processor": None}))
    assert not Tokenizer.from_file(tmp_path).add_bos


def words() -> Backend:
    """Return a tokenizer of whole words, which has no id for others."""
    backend = Backend(models.WordLevel({"[UNK]": 0, "Plain": 1, "words": 2, ",": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


def normalized() -> Backend:
    """Return a byte-level tokenizer that joins runs of spaces first."""
    backend = Backend.from_str(TrainedTokenizer(300).prepare([sentence(1)])._backend.to_str())
    backend.normalizer = normalizers.Replace("  ", " ")
    backend.decoder = decoders.ByteLevel()
    return backend


@pytest.mark.parametrize(
    ("backend", "told"),
    [
        (words, ".Plain words, 3 of .*no ids for some characters"),
        (normalized, "'  two  spaces.*it changes them"),
    ],
)
def test_a_tokenizer_that_does_not_bring_text_back_is_told(tmp_path: Path, backend: Any, told: str) -> None:
    backend().save(str(tmp_path / "tokenizer.json"))
    (note,) = Tokenizer.from_file(tmp_path).notes()
    assert re.search(f"does not bring every text back: {told}", note), note


def test_one_that_brings_text_back_is_not_told_of(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert tokenizer.notes() == []
    folder = save(tokenizer, tmp_path, tokenizer_config={"eos_token": "</s>", "bos_token": None})
    (note,) = Tokenizer.from_file(folder).notes()
    assert note == "the tokenizer has no id for its eos_token '</s>': texts go without it"


def test_an_id_that_ends_a_text_and_that_the_tokenizer_lacks_is_told(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    last = tokenizer.size - 1
    folder = save(tokenizer, tmp_path, generation_config={"eos_token_id": [1, last, 99999]})
    (note,) = Tokenizer.from_file(folder).notes()
    assert f"has the ids 0 to {last:,}, and eos_token_id beside it names 99999, which is none" in note


def test_a_pointer_beside_it_is_not_saved_into_a_run(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = save(tokenizer, tmp_path / "in")
    (source / "tokenizer.model").write_text(POINTER)
    with pytest.raises(UserError, match=r"in/tokenizer\.model is a Git-LFS pointer"):
        Tokenizer.from_file(source).save(tmp_path / "out")
    assert not [*(tmp_path / "out").iterdir()]


def test_one_from_disk_is_saved_byte_for_byte_with_all_that_stands_beside_it(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = save(tokenizer, tmp_path / "in", special_tokens_map={"eos_token": EOS}, added_tokens={EOS: 1})
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "tokenizer_config.json").write_text('{ "eos_token":"<|pad|>","unknown":1 }')
    (source / "config.json").write_text("{}")
    Tokenizer.from_file(source).save(tmp_path / "out")
    names = {path.name for path in source.iterdir()} - {"config.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    Tokenizer.from_file(tmp_path / "out").save(tmp_path / "out")  # as a resumed run does


def test_a_bare_one_gets_a_config_with_the_tokens_found_by_name(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = save(tokenizer, tmp_path / "in") / "tokenizer.json"
    file.rename(tmp_path / "my.json")
    Tokenizer.from_file(tmp_path / "my.json").save(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == (BOS, EOS)
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert Tokenizer.from_file(tmp_path / "out").fingerprint() == tokenizer.fingerprint()


UNREADABLE = {
    "tokenizer.model": ("\x00\x01", "SentencePiece vocabulary.*save_pretrained"),
    "vocab.json": ("{}", "slow tokenizer.*save_pretrained"),
    "qwen.tiktoken": ("IQ== 0", "tiktoken vocabulary of another name"),
    "tokenization_x.py": ("", "code of a release is never run: give its tokenizer.json"),
    "tokenizer_config.json": ("{}", "fetch the files beside it.*assets=tokenizer"),
    "tokenizer.json": (POINTER, "Git-LFS pointer.*git lfs pull.*direction=download"),
    "tiktoken.model": (POINTER, "Git-LFS pointer.*git lfs pull.*direction=download"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_kind_that_is_not_read_is_refused_with_the_way_on(tmp_path: Path, name: str) -> None:
    content, told = UNREADABLE[name]
    (tmp_path / name).write_text(content)
    assert has_tokenizer(tmp_path)
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path / name))}.*{told}"):
        Tokenizer.from_file(tmp_path)


@pytest.mark.parametrize(
    "name", ["tokenizer_config", "special_tokens_map", "added_tokens", "generation_config"]
)
@pytest.mark.parametrize("content", ["{", "[]", POINTER])
def test_a_damaged_file_beside_it_is_named(
    tokenizer: Tokenizer, tmp_path: Path, name: str, content: str
) -> None:
    with pytest.raises(UserError, match=rf"{name}\.json (is not JSON|is no JSON object|is a Git-LFS)"):
        Tokenizer.from_file(save(tokenizer, tmp_path, **{name: content}))


def test_a_folder_without_a_tokenizer_and_a_repository_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert not has_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"holds no tokenizer: a tokenizer\.json or a tiktoken\.model"):
        LocalTokenizer(str(tmp_path)).prepare()
    with pytest.raises(UserError, match=r"owner/name does not exist.*repo=owner/name assets=all"):
        LocalTokenizer("owner/name").prepare()


def test_the_named_command_writes_a_tokenizer_that_is_read(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = json.loads(tokenizer._backend.to_str())["model"]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "vocab.json").write_text(json.dumps(backend["vocab"]))
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in backend["merges"])])
    (tmp_path / "in" / "merges.txt").write_text(merges)
    (tmp_path / "in" / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(UserError) as told:
        Tokenizer.from_file(tmp_path / "in")
    found = re.search(r'python -c "([^"]+)"', str(told.value))
    assert found is not None
    monkeypatch.chdir(tmp_path)
    exec(found[1], {})
    text = sentence(3)
    assert Tokenizer.from_file(tmp_path / "OUT").encode(text) == tokenizer.encode(text)
