"""Long documents in windows: the ids are those of the `tokenizers` library for the whole text."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from dsv3.tokens import document_encoder
from dsv3.tokens.document_encoder import DocumentEncoder
from dsv3.tokens.tokenizer import Tokenizer, TrainedTokenizer
from tests.data.texts import sentence

TEXTS = [sentence(number) for number in range(40)]


def byte_level() -> Tokenizer:
    return TrainedTokenizer(400).prepare(TEXTS)


def trained(backend: Any, trainer: Any) -> Tokenizer:
    backend.train_from_iterator(TEXTS, trainer)
    return Tokenizer(backend, {})


def llama2() -> Tokenizer:
    """As Llama 2's tokenizer.json: a normalizer that puts a space before a text, BPE over all of it."""
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    return trained(
        backend, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    )


def metaspace() -> Tokenizer:
    """As T5's: words with a mark before them, a unigram model."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return trained(
        backend,
        trainers.UnigramTrainer(
            vocab_size=200, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
        ),
    )


def unbroken() -> Tokenizer:
    """BPE over the whole text: an id may hold the end of a line and the beginning of the next."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    return trained(
        backend, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    )


def long_text(seed: int) -> str:
    """Lines, runs of white space and words, about 10,000 characters."""
    draw = random.Random(seed)
    return "".join(
        draw.choice(
            [
                sentence(draw.randrange(1000)),
                "\n\n",
                "   ",
                "    return x\n",
                "\u6f22\u5b57\u3002",
                "word " * 9,
            ]
        )
        for _ in range(200)
    )


@pytest.mark.parametrize("make", [byte_level, llama2, metaspace, unbroken])
def test_ids_are_those_of_the_whole_text(
    make: Callable[[], Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_encoder, "WINDOW", 400)
    monkeypatch.setattr(document_encoder, "CONTEXT", 40)
    tokenizer = make()
    for seed in range(6):
        encoder = DocumentEncoder(tokenizer)
        text = long_text(seed)
        draw = random.Random(seed)
        cuts = sorted(draw.sample(range(len(text)), 9))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        windows = list(encoder.windows(pieces))
        assert len(windows) > 5
        assert [window.last for window in windows] == [False] * (len(windows) - 1) + [True]
        assert "".join(window.text for window in windows) == text
        ids = [index for found in encoder.encode(windows) for index in found]
        assert ids == tokenizer._backend.encode(text, add_special_tokens=False).ids
        assert encoder.blind_cuts == 0
        # Where a window ends does not depend on the pieces.
        assert windows == list(encoder.windows([text]))


def test_a_text_without_breaks_is_cut_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_encoder, "WINDOW", 100)
    encoder = DocumentEncoder(byte_level())
    text = "x" * 1000
    windows = list(encoder.windows([text]))
    assert max(len(window.text) for window in windows) <= 200
    assert encoder.blind_cuts == len(windows) - 1
    ids = [index for found in encoder.encode(windows) for index in found]
    assert encoder.tokenizer.decode(ids) == text
