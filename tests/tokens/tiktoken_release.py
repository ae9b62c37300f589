"""Made-up releases without a tokenizer.json: tiktoken.model, the Python file with its rules, the configs."""

import base64
import json
import random
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.data.texts import sentence

PIECES = [
    r"[\p{Han}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
]
"""The pattern of Kimi-K2's and Moonlight's releases."""

PATTERN = "|".join(PIECES)

RESERVED = 16

SPECIAL = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 5: "<|tool_call_begin|>", 15: "[PAD]"}
"""Named special tokens by their place after the ids of tiktoken.model; the fourth is not `special`."""

TEXTS = {
    "Chinese": "漢字和中文混合English\uff0c还有标点。的的的的的不是在了々〇 "
    "一二三\U00020000\U0002ebf0\U00031350",
    "other scripts": "Привет, мир! Здравствуйте.  かなカナ漢字ひらがな 한국어 텍스트 ภาษาไทย हिन्दी "
    "عربي Ελληνικά",
    "code": "def f(x, *args):\n\treturn {'a': [x**2 for x in range(10)], \"b\": 1e-5}  # ok\n\n\n"
    "class A:\r\n    pass\r\n",
    "emoji": "😀👍🏽👨\u200d👩\u200d👧\u200d👦❤\ufe0f🇩🇪 ok😀😀😀 1\ufe0f\u20e3",
    "numbers": "1 12 123 1234 12345 1234567 3.14159 1,000,000 ½²³ ٣٤٥ Ⅷ x1y22z333",
    "spaces": "  a   b\t\tc \n\n\n  d\r\n\r\n \u3000e\xa0\xa0f\u2028g\x85h      \n      i        ",
    "contractions": "I've he'll SHE'LL it's IT'S we'd don'T 'tis 'Ve'M O'Re a'\u017f k'd ''s' don\u2019t",
    "marks": "e\u0301a\u0308o\u0302 n\u0303\u0303 क\u093f \u0301 \u0301\u0302x Z\u0335\u0321a\u0337l\u0336go",
    "cases": "CamelCase camelCase HTTPServer ǅungla İstanbul \u0131i ßẞ ﬁne ʰx aʰB ΣΑΣ σας",
    "runs": "a" * 57 + " " * 33 + "-" * 41 + "\n" * 19 + "=" * 7 + "ab" * 20 + "!?" * 9,
    "odd": "\x00\x01\x7f\ufeff\ufffd\ufffe\U0010ffff\ue000 [EOS] <|im_end|>[BOS]x <|reserved_token_300|>",
}
"""Texts of many kinds."""

CODE = '''"""The tokenizer of a release."""

raise SystemExit("code of a release is never run")


class TikTokenTokenizer(object):
    vocab_files_names = {{"vocab_file": "tiktoken.model"}}

    num_reserved_special_tokens = {reserved}

    pat_str = "|".join(
        [
            {pieces}
        ]
    )
'''


def ranks(size: int, seed: int | None = None) -> dict[bytes, int]:
    """Return byte strings with ranks, learnt from TEXTS and some English; a seed shuffles the longer ones."""
    backend = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    rows = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pieces, rows])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    texts = [*TEXTS.values()] * 3 + [sentence(number) for number in range(30)]
    backend.train_from_iterator(texts, trainer)
    backend.decoder = decoders.ByteLevel()
    printable = {*range(33, 127), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    bytes_of = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
    learnt = sorted(backend.get_vocab().items(), key=lambda pair: pair[1])
    tokens = [bytes(bytes_of[character] for character in token) for token, _ in learnt]
    longer = [token for token in tokens if len(token) > 1]
    if seed is not None:
        random.Random(seed).shuffle(longer)
    single = [bytes([byte]) for byte in range(256)]
    return {token: rank for rank, token in enumerate([*single, *longer])}


def added_tokens(first: int) -> dict[str, dict[str, Any]]:
    """Return the added_tokens_decoder of tokenizer_config.json."""
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {
        str(first + place): {"content": name, "special": not name.startswith("<|tool"), **flags}
        for place, name in SPECIAL.items()
    }


def write_release(folder: Path, learnt: dict[bytes, int], name: str = "tokenization_kimi") -> Path:
    """Write tiktoken.model, its code, tokenizer_config.json and generation_config.json into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in learnt.items()]
    (folder / "tiktoken.model").write_bytes(b"".join(lines))
    listed = ",\n            ".join(f'r"""{piece}"""' for piece in PIECES)
    (folder / f"{name}.py").write_text(CODE.format(reserved=RESERVED, pieces=listed), "utf-8")
    config = {
        "added_tokens_decoder": added_tokens(len(learnt)),
        "auto_map": {"AutoTokenizer": [f"{name}.TikTokenTokenizer", None]},
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "pad_token": "[PAD]",
        "tokenizer_class": "TikTokenTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ends = {"eos_token_id": [len(learnt) + 2, len(learnt) + 1]}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return folder
