"""The token file holds the ids of the tokenizer, and damage to it is noticed."""

import json
from pathlib import Path

import numpy as np
import pytest

from dsv3.data.cache import CacheEntryError
from dsv3.data.token_file import encode_documents, load_or_tokenize, read_token_file, write_token_file
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import UserError
from tests.data.texts import sentence


def test_documents_stand_between_bos_and_eos_and_decode_to_themselves(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    texts = [sentence(number) for number in range(5)]
    file = load_or_tokenize(tmp_path / "tokens", tokenizer, texts)
    assert file.num_documents == 5
    assert isinstance(file.tokens, np.memmap)
    assert file.tokens.dtype == np.uint16
    for text, begin, end in zip(texts, file.offsets, file.offsets[1:], strict=False):
        ids = file.tokens[begin:end].tolist()
        assert (ids[0], ids[-1]) == (tokenizer.bos, tokenizer.eos)
        assert tokenizer.decode(ids[1:-1], skip_special=False) == text


def test_a_text_that_spells_the_end_token_does_not_end(tokenizer: Tokenizer) -> None:
    (ids,) = encode_documents(tokenizer, ["a<|end_of_sentence|>b"])
    assert np.count_nonzero(ids == tokenizer.eos) == 1


def test_a_large_vocabulary_gets_wider_numbers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    class Large(Tokenizer):
        def __init__(self) -> None:
            self.size, self.bos, self.eos = 65536, None, None

        def encode_batch(self, texts: object) -> list[list[int]]:
            return [[65535, 1], []]

    file = load_or_tokenize(tmp_path / "tokens", Large(), ["a", "b"])
    assert file.tokens.dtype == np.uint32
    assert file.tokens.tolist() == [65535, 1]
    assert file.num_documents == 1  # a document without a token is none


def test_a_sound_file_is_not_written_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = load_or_tokenize(tmp_path / "tokens", tokenizer, ["one", "two"])
    again = load_or_tokenize(tmp_path / "tokens", tokenizer, (pytest.fail("read again") for _ in "x"))
    assert again.tokens.tolist() == first.tokens.tolist()


@pytest.mark.parametrize(
    "damage", ["truncate tokens", "truncate offsets", "no sizes", "no tokens", "json", "other sizes", "swap"]
)
def test_a_damaged_file_is_noticed_and_built_anew(tokenizer: Tokenizer, tmp_path: Path, damage: str) -> None:
    target = tmp_path / "tokens"
    texts = [sentence(number) for number in range(5)]
    sound = load_or_tokenize(target, tokenizer, texts).tokens.tolist()
    for word in ("tokens", "offsets"):
        if damage == f"truncate {word}":
            file = target / f"{word}.npy"
            file.write_bytes(file.read_bytes()[:-2])
    if damage == "no sizes":
        (target / "sizes.json").unlink()
    if damage == "no tokens":
        (target / "tokens.npy").unlink()
    if damage == "json":
        (target / "sizes.json").write_text("[]")
    if damage == "other sizes":
        (target / "sizes.json").write_text(json.dumps({"tokens.npy": 3, "offsets.npy": 5}))
    if damage == "swap":  # right sizes, but offsets of something else
        np.save(target / "offsets.npy", np.arange(6))
    with pytest.raises(CacheEntryError):
        read_token_file(target)
    assert load_or_tokenize(target, tokenizer, texts).tokens.tolist() == sound


def test_no_token_at_all_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no token"):
        write_token_file(tmp_path, iter(()), np.dtype("<u2"))


def test_a_document_longer_than_a_group_comes_out_whole(tokenizer: Tokenizer) -> None:
    text = sentence(1) * 100
    assert len(text) > 10 * 1000
    before, long, after = encode_documents(tokenizer, ["before", text, "after"], chunk_characters=1000)
    assert long.tolist() == [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]
    assert before.tolist() == [tokenizer.bos, *tokenizer.encode("before"), tokenizer.eos]
    assert after.tolist() == [tokenizer.bos, *tokenizer.encode("after"), tokenizer.eos]
