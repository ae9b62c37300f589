"""Releases without a tokenizer.json: the same ids as the `tiktoken` package gives, on text of many kinds."""

import json
import random
from pathlib import Path

import pytest
import tiktoken

from dsv3.errors import UserError
from dsv3.tokens.tokenizer import Tokenizer
from tests.data.texts import sentence
from tests.tokens.tiktoken_release import PATTERN, RESERVED, SPECIAL, TEXTS, ranks, write_release


@pytest.fixture(scope="module")
def learnt() -> dict[bytes, int]:
    """Byte strings and ranks as training gives them."""
    return ranks(1500)


@pytest.fixture
def release(tmp_path: Path, learnt: dict[bytes, int]) -> Path:
    """The tokenizer of a release."""
    return write_release(tmp_path / "release", learnt)


def mixtures(seed: int, number: int) -> list[str]:
    """Return texts made of random characters of TEXTS, alone and in runs."""
    draw, characters = random.Random(seed), ["".join(TEXTS.values()), *TEXTS.values(), "ab 's\n漢1e\u0301"]
    return [
        "".join(draw.choice(pool) * draw.choice((1, 1, 1, 2, 5)) for _ in range(draw.randint(1, 80)))
        for pool in draw.choices(characters, k=number)
    ]


# Shuffled ranks make what is rare in a released list: tokens that merging never gives, and tokens of several
# pairs.
@pytest.mark.parametrize("seed", [None, 1, 2], ids=["as learnt", "shuffled", "shuffled anew"])
def test_ids_are_those_of_tiktoken_on_text_of_every_kind(tmp_path: Path, seed: int | None) -> None:
    learnt = ranks(1500, seed)
    tokenizer = Tokenizer.from_file(write_release(tmp_path, learnt))
    reference = tiktoken.Encoding("made up", pat_str=PATTERN, mergeable_ranks=learnt, special_tokens={})
    texts = {**TEXTS, **{str(number): text for number, text in enumerate(mixtures(0, 300))}}
    texts["English"] = sentence(1000)
    for kind, text in texts.items():
        ids = tokenizer.encode(text)
        assert ids == reference.encode_ordinary(text), kind
        assert tokenizer.decode(ids, skip_special=False) == text, kind


def test_every_character_is_of_the_class_that_tiktoken_puts_it_in(
    release: Path, learnt: dict[bytes, int]
) -> None:
    tokenizer = Tokenizer.from_file(release)
    reference = tiktoken.Encoding("made up", pat_str=PATTERN, mergeable_ranks=learnt, special_tokens={})
    # Between letters, a digit and a space every class of the pattern cuts in its own way.
    stride = [*range(0x3100), *range(0x3100, 0xD800, 7), *range(0xE000, 0x32000, 5), 0x10FFFF]
    text = "".join(f"a{chr(number)}B's{chr(number)}1 " for number in stride)
    assert tokenizer.encode(text) == reference.encode_ordinary(text)


def test_special_tokens_have_the_names_and_ids_of_the_release(
    release: Path, learnt: dict[bytes, int]
) -> None:
    tokenizer, first = Tokenizer.from_file(release), len(learnt)
    assert tokenizer.size == first + RESERVED
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (first, first + 1, first + 15)
    assert tokenizer.stop == (first + 1, first + 2)
    for place in range(RESERVED):
        name = SPECIAL.get(place, f"<|reserved_token_{first + place}|>")
        assert tokenizer.decode([first + place], skip_special=False) == name
    assert tokenizer.decode([first + 5]) == "<|tool_call_begin|>"  # not special, as the file says
    assert max(tokenizer.encode("[BOS] a [EOS]<|im_end|>")) < first
    assert not tokenizer.add_bos


def test_a_saved_one_has_the_files_of_the_release_and_gives_the_same_ids(
    release: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_file(release)
    tokenizer.save(tmp_path / "saved")
    names = {"tiktoken.model", "tokenization_kimi.py", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "saved").iterdir()} == names
    assert all((tmp_path / "saved" / name).read_bytes() == (release / name).read_bytes() for name in names)
    again = Tokenizer.from_file(tmp_path / "saved" / "tiktoken.model")
    again.save(tmp_path / "saved")
    assert again.fingerprint() == tokenizer.fingerprint()


def damage(release: Path, name: str, content: str) -> None:
    (release / name).write_text(content, "utf-8")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("tiktoken.model", "IQ== 0\nIg== 2\n", "line 2 is not a token and the rank 1"),
        ("tiktoken.model", "IQ== 0\n", "no token for 255 of the 256 bytes"),
        ("tiktoken.model", "!!!! 0\n", "list of tokens"),
        ("tiktoken.model", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (
            "tokenization_kimi.py",
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "git lfs pull",
        ),
        ("tokenization_kimi.py", "def (", "tokenization_kimi.py is not Python"),
        ("tokenization_kimi.py", "pat_str = open('x').read()", "pat_str as plain text"),
        ("tokenization_kimi.py", "pat_str = '|'.join([r'a', open('x')])", "pat_str as plain text"),
        ("tokenization_kimi.py", "pat_str = '['", "pat_str is not one that can be read"),
        *(
            (
                "tokenization_kimi.py",
                f"pat_str = 'x'\n{count}",
                "num_reserved_special_tokens as a plain number",
            )
            for count in (
                "num_reserved_special_tokens = int('16')",
                "num_reserved_special_tokens = 2 * 8",
                "num_reserved_special_tokens = True",
                "num_reserved_special_tokens = 16\nif x:\n    num_reserved_special_tokens = 32",
                "class T:\n  def __init__(self):\n    self.num_reserved_special_tokens = 16",
            )
        ),
        ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["other.T", null]}}', "other.py"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 1}}', "are no ids and names"),
    ],
)
def test_what_is_damaged_or_not_plain_is_refused_by_name(
    release: Path, name: str, content: str, told: str
) -> None:
    damage(release, name, content)
    with pytest.raises(UserError, match="(?s)" + told.replace(".", r"\.").replace("(", r"\(")):
        Tokenizer.from_file(release)


def test_rules_that_are_missing_are_fetched_as_told(release: Path) -> None:
    (release / "tokenization_kimi.py").unlink()
    with pytest.raises(UserError, match=r"tokenization_kimi\.py, which is not beside it.*assets=tokenizer"):
        Tokenizer.from_file(release)


def test_one_that_was_cut_off_between_two_lines_is_refused_by_the_ids_that_are_named(
    release: Path, learnt: dict[bytes, int]
) -> None:
    file = release / "tiktoken.model"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:400]))
    told = rf"tiktoken\.model has 400 tokens and leaves the ids 400 to 415 .*the id {len(learnt)}, '\[BOS\]'"
    with pytest.raises(UserError, match=f"{told}.*assets=tokenizer"):
        Tokenizer.from_file(release)
    # Without a number of reserved ids the named ones are all there are.
    code = release / "tokenization_kimi.py"
    code.write_text(code.read_text("utf-8").replace("num_reserved_special_tokens", "other"), "utf-8")
    with pytest.raises(UserError, match="400 tokens and leaves the ids 400 to 404 "):
        Tokenizer.from_file(release)


def test_names_beyond_the_reserved_ids_are_refused_and_need_no_number_of_them(
    release: Path, learnt: dict[bytes, int]
) -> None:
    code, beside = release / "tokenization_kimi.py", release / "tokenizer_config.json"
    config = json.loads(beside.read_text())
    first = len(learnt)
    config["added_tokens_decoder"] = {str(first): {"content": "[BOS]"}, str(first + 1): {"content": "[EOS]"}}
    beside.write_text(json.dumps(config))
    source = code.read_text("utf-8")
    code.write_text(source.replace("num_reserved_special_tokens", "other"), "utf-8")
    assert Tokenizer.from_file(release).size == first + 2
    code.write_text(source.replace(f"tokens = {RESERVED}", "tokens = 1"), "utf-8")
    with pytest.raises(UserError, match=rf"the ids {first} to {first} .*the id {first + 1}, '\[EOS\]'"):
        Tokenizer.from_file(release)


def test_a_name_that_has_another_id_already_is_refused(release: Path) -> None:
    config = json.loads((release / "tokenizer_config.json").read_text())
    listed = config["added_tokens_decoder"]
    listed[max(listed)]["content"] = "[BOS]"
    (release / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"'\[BOS\]' has another name already"):
        Tokenizer.from_file(release)
