"""Tokenizers: one trained on the corpus or one from disk, both as a `Tokenizer`."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from dsv3.config.limits import LARGEST_VOCABULARY
from dsv3.distributed.heartbeat import HEARTBEAT
from dsv3.errors import UserError, quoted
from dsv3.tokens.cache import CacheEntryError, load_or_build
from dsv3.tokens.tiktoken_model import added_token, convert_tiktoken
from dsv3.tokens.tokenizer_files import (
    TIKTOKEN_MODEL,
    TOKENIZER_JSON,
    copy_tokenizer_files,
    read_stop_ids,
    read_tokenizer_config,
    token_name,
    vocabulary_file,
)
from dsv3.untrusted_files import parse_json, read_bytes

BOS, EOS, PAD = "<|begin_of_sentence|>", "<|end_of_sentence|>", "<|pad|>"

SPECIAL_TOKENS = (BOS, EOS, PAD, "<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>")

# The usual names, for a tokenizer without a tokenizer_config.json: DeepSeek, Llama 2/3, Qwen, GPT-2.
BOS_NAMES = (BOS, "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<|begin_of_text|>", "<s>", "[BOS]", "<bos>")

EOS_NAMES = (
    EOS,
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<|end_of_text|>",
    "</s>",
    "[EOS]",
    "<eos>",
    "<|endoftext|>",
)

FIM_NAMES = (
    ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)
"""The tokens before prefix, suffix and middle of fill-in-the-middle: ours, DeepSeek, Qwen, StarCoder."""

_FILES = 3
"""Part of the cache key of a trained tokenizer: raise it when its files are to be written differently."""

TRAINING_CHUNK = 1 << 16  # characters; the trainer reads 256 texts at once and needs 80 bytes per character

FAST_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,  # HF would otherwise change the text on decoding
    "model_input_names": [
        "input_ids",
        "attention_mask",
    ],  # by default token_type_ids too, which generate refuses
    "padding_side": "left",  # a model goes on behind the last id of a row, which may be no padding
}
"""Keys of the tokenizer_config.json of a tokenizer.json that is written here."""

# A place at which a long document may be cut without changing its ids: a byte-level pre-tokenizer starts
# afresh after a line break between two lines that neither end nor begin with white space.
SAFE_BREAK = re.compile(r"(?<=\S\n)(?=\S)")


SLOWEST_START, SLOWEST_ENCODING = 5.0, 20_000
"""Seconds, and characters per second, of the slowest encoding: one call that says nothing."""

PROBES = (
    "Plain words, 3 of 12; it's 3.5 %.",
    "  two  spaces\t tab\n\n    line\r\n ",
    "na\u00efve \u6f22\u5b57 \u043d\u0435 \U0001f600 \ufb01",
    "e\u0301 \u1100\u1161 \u212b",
    "def f(x): return {'a': [x, ...]}  # ok .",
)
"""Texts that every byte-level tokenizer brings back: spaces, scripts, combining marks, code."""


class Tokenizer:
    """Encode text to ids and decode ids to text, as a tokenizer.json says, but for special tokens in text.

    A document that merely contains the characters of a special token is encoded as those characters: only
    the program inserts special ids.

    Args:
        backend: the `tokenizers.Tokenizer`.
        config: the content of tokenizer_config.json, which names the special tokens.
        source: the file that it was read from; None for one that was trained.

    Attributes:
        bos: the id that begins a text, None where there is none.
        add_bos: whether texts are begun with it.
        eos: the id that ends a document, None where there is none.
        stop: all ids that end a generated text.
        pad: the id of padding, which is not used here.
    """

    def __init__(self, backend: Any, config: dict[str, Any], source: Path | None = None) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # tokenizer.json has no such setting
        self._backend = backend
        self._config = config
        self._source = source
        self.bos = self._special_id("bos_token", BOS_NAMES)
        self.eos = self._special_id("eos_token", EOS_NAMES)
        self.pad = self._special_id("pad_token", ())
        self.stop: tuple[int, ...] = () if self.eos is None else (self.eos,)
        with _in_words(f"the tokenizer {source or ''} cannot encode a text"):
            self.add_bos = self.bos is not None and self._adds_bos()
        self.size = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Load a tokenizer.json or tiktoken.model, or the one in the directory `path`, and what is beside it.

        Raises:
            UserError: it does not exist, is damaged, or is of a kind that is not read.
        """
        file = vocabulary_file(path)
        config = read_tokenizer_config(file.parent)
        if file.name == TIKTOKEN_MODEL:
            backend = convert_tiktoken(file, config)
        else:
            backend = _read_backend(file)
            _add_missing(backend, file, config)
        tokenizer = cls(backend, config, file)
        tokenizer.stop_also_at(read_stop_ids(file.parent))
        return tokenizer

    @property
    def fim(self) -> tuple[int, int, int] | None:
        """Return the ids before prefix, suffix and middle of fill-in-the-middle, None without them."""
        for names in FIM_NAMES:
            begin, hole, end = (self._backend.token_to_id(name) for name in names)
            if begin is not None and hole is not None and end is not None:
                return begin, hole, end
        return None

    @property
    def document(self) -> str:
        """Return the form in which a document is trained on, for people: its text between special tokens."""
        ids = (self.bos if self.add_bos else None, self.eos)
        begin, end = ("" if index is None else self.decode([index], skip_special=False) for index in ids)
        return " ".join(filter(None, (begin, "text", end)))

    def stop_also_at(self, ids: Iterable[int]) -> None:
        """Add ids that end a generated text, such as those of a generation_config.json elsewhere."""
        self.stop = tuple(dict.fromkeys((*self.stop, *ids)))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without bos and eos."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without bos and eos; use one thread per core."""
        patience = SLOWEST_START + sum(map(len, texts)) / SLOWEST_ENCODING
        what = f"the tokenizer {self._source or ''} cannot encode a text"
        with HEARTBEAT.patient(patience), _in_words(what):
            encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Return the text of ids; this inverts `encode` for every string, if the tokenizer works on bytes."""
        with _in_words(f"the tokenizer {self._source or ''} cannot decode ids"):
            return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))

    def save(self, directory: str | Path) -> None:
        """Write the files which `from_file` and HF's AutoTokenizer read: of a tokenizer from disk its own.

        A bare tokenizer.json gets a tokenizer_config.json with the special tokens that were found by name.
        """
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        if self._source is not None:
            if self._source.parent.resolve() != target.resolve():
                copy_tokenizer_files(self._source.parent, target)
                if self._source.name != TIKTOKEN_MODEL:  # a tokenizer.json may have any name
                    shutil.copyfile(self._source, target / TOKENIZER_JSON)
        else:
            (target / TOKENIZER_JSON).write_text(self._backend.to_str(pretty=True), "utf-8")
            named = {key: value for key, value in self._config.items() if key.endswith("_token") and value}
            _write_json(
                target / "special_tokens_map.json", {k: v for k, v in named.items() if isinstance(v, str)}
            )
        if not (target / "tokenizer_config.json").exists():
            names = {"bos_token": self.bos, "eos_token": self.eos}
            found = {
                key: self._backend.id_to_token(index) for key, index in names.items() if index is not None
            }
            _write_json(target / "tokenizer_config.json", FAST_CONFIG | found | self._config)

    def fingerprint(self) -> str:
        """Return 16 hex characters over everything that decides the ids of a document."""
        bos = self.bos if self.add_bos else None
        contents = f"{self._backend.to_str()}\0{bos}\0{self.eos}"
        return hashlib.sha256(contents.encode()).hexdigest()[:16]

    def notes(self) -> list[str]:
        """Return a line per flaw: a name without an id, an id that it lacks, a text that it changes."""
        ids_of = {"bos_token": self.bos, "eos_token": self.eos}
        lines = [
            f"the tokenizer has no id for its {key} {quoted(name)}: texts go without it"
            for key, index in ids_of.items()
            if index is None and (name := token_name(self._config.get(key)))
        ]
        lines += [
            f"the tokenizer has the ids 0 to {self.size - 1:,}, and eos_token_id beside it names {index}, "
            "which is none of them"
            for index in self.stop
            if index >= self.size
        ]
        for text in PROBES:
            ids = self.encode(text)
            back = self.decode(ids, skip_special=False)
            if back != text:
                unknown = self._special_id(
                    "unk_token", filter(None, [getattr(self._backend.model, "unk_token", None)])
                )
                why = "it has no ids for some characters" if unknown in ids else "it changes them"
                told = f"{quoted(text)} comes back as {quoted(back)}; {why}"
                line = f"the tokenizer does not bring every text back: {told}"
                return [*lines, f"{line}, and the model learns and writes the changed text"]
        return lines

    def _special_id(self, key: str, names: Iterable[str]) -> int | None:
        """Return the id of the token that the config names at `key`, else of the first of `names` it has."""
        if key in self._config:  # null says that the tokenizer has no such token
            named = token_name(self._config[key])
            names = [] if named is None else [named]
        found = (self._backend.token_to_id(name) for name in names)
        return next((index for index in found if index is not None), None)

    def _adds_bos(self) -> bool:
        """Return whether the files put bos before a text: tokenizer_config.json, else the post-processor."""
        told = self._config.get("add_bos_token")
        return told if isinstance(told, bool) else self.bos in self._backend.encode("").ids[:1]


_LONG_NUMBER = re.compile(rb"[:\s]\d{8,}")
"""May be an id above LARGEST_VOCABULARY."""


def _read_backend(file: Path) -> Any:
    """Return the tokenizer in a tokenizer.json; UserError where it is none."""
    content = read_bytes(file, "tokenizer")
    if _LONG_NUMBER.search(content):
        _require_small_ids(parse_json(content, file, "tokenizer"), file)
    with _in_words(f"{file} is not a tokenizer that can be read"):
        return tokenizers.Tokenizer.from_buffer(content)


def _require_small_ids(found: Any, file: Path) -> None:
    """Raise UserError for an id that is too large: the library makes room for all ids below it."""
    nodes = [found]
    for node in nodes:  # it grows
        inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        for value in inner:
            if isinstance(value, dict | list):
                nodes.append(value)
            elif type(value) is int and value > LARGEST_VOCABULARY:
                raise UserError(
                    f"{file} has the number {quoted(value)}, and ids lie below {LARGEST_VOCABULARY:,}: it is "
                    "damaged"
                )


@contextmanager
def _in_words(what: str) -> Iterator[None]:
    """Raise what the library raises, plain Exceptions and panics of Rust, as a UserError that says `what`."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{' '.join(what.split())}: {reason[:200]}") from error


def _add_missing(backend: Any, file: Path, config: dict[str, Any]) -> None:
    """Add tokens that only the files beside a tokenizer.json list; UserError where their ids do not fit."""
    listed = {int(index): told for index, told in config.get("added_tokens_decoder", {}).items()}
    for index, told in sorted(listed.items()):
        name = told["content"]
        if backend.token_to_id(name) is None:
            backend.add_tokens([added_token(told)])
        if (own := backend.token_to_id(name)) != index:
            raise UserError(
                f"{file} gives {quoted(name)} the id {own}, and the files beside it {index}: "
                "they are of two tokenizers"
            )


def _write_json(path: Path, values: dict[str, Any]) -> None:
    """Write an object in the layout of transformers."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False, sort_keys=True) + "\n", "utf-8")


def training_patience(characters: int) -> float:
    """Return the seconds that a tokenizer's training may take, one call that says nothing meanwhile."""
    return 60.0 + characters / 50_000


class TokenizerSource(Protocol):
    """A choice of `tokenizer`, from which a Tokenizer can be made."""

    def prepare(self, texts: Iterable[str], cache: Path | None = None) -> Tokenizer:
        """Return the tokenizer for `texts`; `cache` is the path prefix of the corpus's cache entries."""


class TrainedTokenizer:
    """A byte-level BPE trained on the corpus: every string survives encoding and decoding.

    Ids 0 to 5 are SPECIAL_TOKENS, then come the 256 bytes, then the merges.

    Args:
        vocab_size: the maximum number of ids; a small corpus yields fewer.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def prepare(self, texts: Iterable[str], cache: Path | None = None) -> Tokenizer:
        """Train on `texts`, or load the tokenizer of an earlier run on them; `texts` is then not read."""
        if cache is None:
            return self._train(texts)
        name = f"{cache.name}-{self.vocab_size}-{tokenizers.__version__}-{_FILES}"

        def read(directory: Path) -> Tokenizer:
            try:
                return Tokenizer.from_file(directory)
            except UserError as error:
                raise CacheEntryError from error

        made_from = f"the training side of a corpus, for at most {self.vocab_size:,} ids"
        return load_or_build(
            cache.with_name(name), read, lambda path: self._train(texts).save(path), made_from
        )

    def _train(self, texts: Iterable[str]) -> Tokenizer:
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        chunks = (chunk for text in texts for chunk in split_text([text], TRAINING_CHUNK))
        backend.train_from_iterator(chunks, trainer)
        # For use with HF: its tokenizers begin a text with bos, as the documents here do.
        bos = backend.token_to_id(BOS)
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]
        )
        tokens = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
        return Tokenizer(backend, {**FAST_CONFIG, **tokens, "add_bos_token": True, "add_eos_token": False})


class LocalTokenizer:
    """A tokenizer from disk; bos and eos come from the files beside it, else from the usual names.

    Args:
        path: a tokenizer.json or tiktoken.model, or a directory that holds one.

    Raises:
        UserError: `path` is not given.
    """

    def __init__(self, path: str | None) -> None:
        if not path:
            raise UserError("tokenizer.path is not set: give a tokenizer.json or a directory that holds one")
        self.path = path

    def prepare(self, texts: Iterable[str] = (), cache: Path | None = None) -> Tokenizer:
        """Load the tokenizer; neither the texts nor the cache are read."""
        try:
            return Tokenizer.from_file(self.path)
        except UserError as error:
            raise UserError(f"tokenizer.path={self.path}: {error}") from error


def split_text(pieces: Iterable[str], size: int) -> Iterator[str]:
    """Yield a text, given in pieces, in chunks of `size` to 2 x `size` characters; the last may be shorter.

    They are cut at a SAFE_BREAK where there is one, at the same places whatever the pieces.
    """
    waiting, length = [""], 0
    for piece in pieces:
        waiting.append(piece)
        length += len(piece)
        if length <= 2 * size:
            continue
        text, start = "".join(waiting), 0
        while length - start > 2 * size:  # leaves room to look for a safe break
            found = SAFE_BREAK.search(text, start + size, start + 2 * size)
            stop = found.start() if found else start + size
            yield text[start:stop]
            start = stop
        waiting, length = [text[start:]], length - start
    yield "".join(waiting)
