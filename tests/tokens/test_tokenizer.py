"""Round trips, special tokens that only the program inserts, and the same bytes for the same corpus."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3.distributed.heartbeat import HEARTBEAT
from dsv3.errors import UserError
from dsv3.tokens.tokenizer import (
    BOS,
    EOS,
    SLOWEST_ENCODING,
    SPECIAL_TOKENS,
    TRAINING_CHUNK,
    LocalTokenizer,
    Tokenizer,
    TrainedTokenizer,
    split_text,
)
from tests.data.texts import sentence

STRANGE = [
    "",
    " ",
    "  two  spaces \t and\ttabs \r\n\r\n   \n",
    "naïve ﬁne 漢字 😀 \u200d \x00 \x7f \ufeff e\u0301",
    "def f(x):\n    return {'a': 1e-5, \"b\": x**2}  # ok ,.!? ' n't\n",
    f"x{EOS} y {BOS}{SPECIAL_TOKENS[2]}",
    "\\n\\t \ud7ff\ue000\U0010ffff",
]


@pytest.mark.parametrize("text", STRANGE)
def test_every_string_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


def test_special_tokens_have_the_first_ids_and_only_the_program_places_them(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos, tokenizer.eos) == (0, 1)
    for index, name in enumerate(SPECIAL_TOKENS):
        assert tokenizer.decode([index], skip_special=False) == name
        assert tokenizer.decode([index]) == ""
        assert min(tokenizer.encode(f"a {name}{name} b")) >= len(SPECIAL_TOKENS)


def test_a_corpus_full_of_special_tokens_teaches_no_special_id(tmp_path: Path) -> None:
    text = "".join(SPECIAL_TOKENS) * 3
    trained = TrainedTokenizer(400).prepare([text] * 100)
    trained.save(tmp_path)
    for tokenizer in (trained, Tokenizer.from_file(tmp_path)):
        assert min(tokenizer.encode(text)) >= len(SPECIAL_TOKENS)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_vocabulary_is_filled_and_no_larger() -> None:
    texts = [sentence(number) for number in range(50)]
    assert TrainedTokenizer(264).prepare(texts).size == 264
    assert TrainedTokenizer(300).prepare(texts).size == 300
    assert 262 < TrainedTokenizer(50_000).prepare(texts).size < 5_000
    assert TrainedTokenizer(300).prepare(["é"]).size >= 262  # every byte, though the corpus has two


def test_the_same_corpus_gives_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    program = (
        "import sys; from dsv3.tokens.tokenizer import TrainedTokenizer; "
        "from tests.data.texts import sentence; "
        "TrainedTokenizer(350).prepare(sentence(n) for n in range(80)).save(sys.argv[1])"
    )
    path = os.pathsep.join([*sys.path, str(Path(__file__).parents[2])])
    for threads in ("1", "2"):
        environment = os.environ | {
            "RAYON_NUM_THREADS": threads,
            "PYTHONHASHSEED": threads,
            "PYTHONPATH": path,
        }
        subprocess.run([sys.executable, "-c", program, tmp_path / threads], env=environment, check=True)
    one, two = ((tmp_path / threads / "tokenizer.json").read_bytes() for threads in ("1", "2"))
    assert one == two


def test_a_long_text_teaches_what_its_lines_do() -> None:
    text = "".join(sentence(number) for number in range(400))
    assert len(text) > TRAINING_CHUNK
    lines = [sentence(number) for number in range(400)]
    assert (
        TrainedTokenizer(350).prepare([text]).fingerprint()
        == TrainedTokenizer(350).prepare(lines).fingerprint()
    )


def test_a_long_text_is_cut_where_that_changes_nothing() -> None:
    text = "a plain line of words\nand one more\n  def\n\n\n b \n\nc,\n(d)\n\t\n  f'll 12\n" * 40
    tokenizer = TrainedTokenizer(500).prepare([text])  # knows runs of white space as tokens
    for size in range(100, 200, 3):
        parts = list(split_text([text], size))
        assert len(parts) > 8
        assert "".join(parts) == text
        joined = [index for part in parts for index in tokenizer.encode(part)]
        assert joined == tokenizer.encode(text)
        for piece in (1, size, 3 * size):
            pieces = [text[begin : begin + piece] for begin in range(0, len(text), piece)]
            assert list(split_text(pieces, size)) == parts


def test_a_text_without_line_breaks_is_cut_anyway() -> None:
    assert [len(part) for part in split_text(["x" * 1000], 300)] == [300, 300, 400]


def test_an_encoding_may_take_as_long_as_its_text_needs(tokenizer: Tokenizer) -> None:
    """It is one call without a beat; the watchdog would end a run whose launch.timeout is shorter."""
    seen: list[float] = []

    class Backend:
        def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> list[object]:
            seen.append(HEARTBEAT.patience)
            return []

    slow = copy.copy(tokenizer)
    slow._backend = Backend()
    for length in (0, 1_000_000):
        slow.encode_batch(["x" * length] * 2)
    assert seen[1] - seen[0] == pytest.approx(2_000_000 / SLOWEST_ENCODING)
    assert HEARTBEAT.patience < seen[1]


def test_saved_and_loaded_is_the_same_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "a")
    loaded = Tokenizer.from_file(tmp_path / "a" / "tokenizer.json")
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert (loaded.bos, loaded.eos, loaded.size) == (tokenizer.bos, tokenizer.eos, tokenizer.size)
    config = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == (BOS, EOS)
    loaded.save(tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_tokenizer_in_the_cache_is_used_and_a_damaged_one_replaced(tmp_path: Path) -> None:
    source, cache = TrainedTokenizer(300), tmp_path / "tokenizer-key"
    first = source.prepare([sentence(1)], cache)
    assert source.prepare(["other text"], cache).fingerprint() == first.fingerprint()
    (entry,) = (path for path in tmp_path.iterdir() if path.is_dir())
    (entry / "tokenizer.json").write_text("{")
    assert source.prepare([sentence(1)], cache).fingerprint() == first.fingerprint()
    assert TrainedTokenizer(280).prepare([sentence(1)], cache).size == 280


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, (0, 1)),
        ({"bos_token": "<|pad|>", "eos_token": {"content": "<|fim_end|>"}}, (2, 5)),
        ({"bos_token": None, "eos_token": "<|fim_end|>"}, (None, 5)),
        ({"model_max_length": 5}, (0, 1)),
    ],
)
def test_bos_and_eos_come_from_the_config_beside_it_else_from_their_names(
    tokenizer: Tokenizer, tmp_path: Path, config: dict[str, object] | None, expected: tuple[int | None, int]
) -> None:
    tokenizer.save(tmp_path)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).unlink()
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = LocalTokenizer(str(path)).prepare()
        assert (loaded.bos, loaded.eos) == expected


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model": {"type": "Unheard"}}'])
def test_a_tokenizer_that_cannot_be_read_is_the_users_mistake(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.path="):
        LocalTokenizer(str(tmp_path)).prepare()
    with pytest.raises(UserError, match=r"tokenizer\.path"):
        LocalTokenizer(None)
