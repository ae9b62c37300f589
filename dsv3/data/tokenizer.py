"""Tokenizers: one trained on the corpus or one from disk, both as a `Tokenizer`."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from dsv3.data.cache import CacheEntryError, load_or_build
from dsv3.errors import UserError

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

TRAINING_CHUNK = 1 << 16  # characters; the trainer reads 256 texts at once and needs 80 bytes per character

# A place at which a long document may be cut without changing its ids: a byte-level pre-tokenizer starts
# afresh after a line break between two lines that neither end nor begin with white space.
SAFE_BREAK = re.compile(r"(?<=\S\n)(?=\S)")


class Tokenizer:
    """Encode text to ids and decode ids to text, as a tokenizer.json says, but for special tokens in text.

    A document that merely contains the characters of a special token is encoded as those characters: only
    the program inserts special ids.

    Args:
        backend: the `tokenizers.Tokenizer`.
        config: the content of tokenizer_config.json, which names the bos and eos tokens.
    """

    def __init__(self, backend: Any, config: dict[str, Any]) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # tokenizer.json has no such setting
        self._backend = backend
        self._config = config
        self.bos = self._special_id("bos_token", BOS_NAMES)
        self.eos = self._special_id("eos_token", EOS_NAMES)
        self.size = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Load a tokenizer.json, or the one in the directory `path`.

        Raises:
            UserError: it does not exist or is damaged.
        """
        file = Path(path).expanduser()
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.is_file():
            raise UserError(
                f"{file} does not exist: a tokenizer.json or a directory that holds one is needed"
            )
        beside = file.with_name("tokenizer_config.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
            config = dict(json.loads(beside.read_text("utf-8"))) if beside.is_file() else {}
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{file} is not a tokenizer that can be read: {error}") from error
        return cls(backend, config)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without bos and eos."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without bos and eos; use one thread per core."""
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Return the text of ids; this inverts `encode` for every string, if the tokenizer works on bytes."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which `from_file` and HF's AutoTokenizer read."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        config = json.dumps(self._config, indent=2, ensure_ascii=False, sort_keys=True)
        (Path(directory) / "tokenizer.json").write_text(self._backend.to_str(pretty=True), "utf-8")
        (Path(directory) / "tokenizer_config.json").write_text(config + "\n", "utf-8")

    def fingerprint(self) -> str:
        """Return 16 hex characters over everything that decides the ids of a document."""
        contents = f"{self._backend.to_str()}\0{self.bos}\0{self.eos}"
        return hashlib.sha256(contents.encode()).hexdigest()[:16]

    def _special_id(self, key: str, names: Sequence[str]) -> int | None:
        """Return the id of the token that the config names at `key`, else of the first of `names` it has."""
        if key in self._config:  # null says that the tokenizer has no such token
            named = self._config[key]
            named = named["content"] if isinstance(named, dict) else named
            names = [] if named is None else [named]
        found = (self._backend.token_to_id(name) for name in names)
        return next((index for index in found if index is not None), None)


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
        name = f"{cache.name}-{self.vocab_size}-{tokenizers.__version__}"

        def read(directory: Path) -> Tokenizer:
            try:
                return Tokenizer.from_file(directory)
            except UserError as error:
                raise CacheEntryError from error

        return load_or_build(cache.with_name(name), read, lambda path: self._train(texts).save(path))

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
        chunks = (chunk for text in texts for chunk, _ in split_text(text, TRAINING_CHUNK))
        backend.train_from_iterator(chunks, trainer)
        # For use with HF: its tokenizers begin a text with bos, as the documents here do.
        bos = backend.token_to_id(BOS)
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]
        )
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,  # HF would otherwise change the text on decoding
        }
        return Tokenizer(backend, config)


class LocalTokenizer:
    """A tokenizer from disk; bos and eos come from its tokenizer_config.json, else from the usual names.

    Args:
        path: a tokenizer.json, or a directory that holds one.

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


def split_text(text: str, size: int) -> Iterator[tuple[str, bool]]:
    """Yield chunks of `size` to 2 x `size` characters, cut at a SAFE_BREAK where there is one.

    The second value of each pair is True for the last chunk of the text.
    """
    start = 0
    while len(text) - start > 2 * size:  # leaves room to look for a safe break
        found = SAFE_BREAK.search(text, start + size, start + 2 * size)
        stop = found.start() if found else start + size
        yield text[start:stop], False
        start = stop
    yield text[start:], True
