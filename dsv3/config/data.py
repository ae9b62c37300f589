"""Schemas of the `data` and `tokenizer` groups."""

from dataclasses import dataclass, field
from typing import ClassVar

from dsv3.config.registry import PATH, Buildable, schema
from dsv3.errors import require

ROW_ORDER = 2
"""Number of the order in which rows are read, and those of a table held out; code that changes it adds 1."""

SMALLEST_VOCABULARY = 264  # 256 bytes, 6 special tokens, and 2 merges so that there is something to learn


@dataclass
class DataConfig(Buildable):
    """The fields that every source of training text has."""

    sets_sequence_length: ClassVar[bool] = False
    """True where rows have a length of their own, the source's `sequence_length`; else text is packed."""

    _target_: str = "???"  # OmegaConf's mark of a missing value: only the choices below can be built
    document_mask: bool = False
    """Keep attention within a document; off, as in the DeepSeek-V3 report (section 4.1)."""
    held_out: float = 0.03
    """Share of the documents set aside for evaluation, chosen by the hash of their content."""
    shuffle: bool = True
    """Permute documents and rows anew in every epoch; off keeps the order of the files."""
    cache_dir: str | None = field(default=None, metadata=PATH)
    """Directory of prepared tokens; null is $DSV3_CACHE, else $XDG_CACHE_HOME/dsv3, else ~/.cache/dsv3."""

    def validate(self) -> None:
        """Raise InvalidValue for a held-out share that leaves too little on either side."""
        require(0 < self.held_out < 0.5, "held_out", self.held_out, "must be above 0 and below 0.5")


@schema("data/stdlib")
@dataclass
class StdlibDataConfig(DataConfig):
    """The Python standard library of the running interpreter; needs no download."""

    _target_: str = "dsv3.data.sources.StdlibData"


@schema("data/text")
@dataclass
class TextDataConfig(DataConfig):
    """The user's own text: a file, or a folder of files."""

    _target_: str = "dsv3.data.sources.TextData"
    path: str | None = field(default=None, metadata=PATH)
    """Text file, or folder of text files."""

    def validate(self) -> None:
        """Raise InvalidValue for a missing path."""
        super().validate()
        require(bool(self.path), "path", self.path, "give a text file or a folder, data.path=FILE_OR_FOLDER")


@schema("data/tokens")
@dataclass
class TokensDataConfig(DataConfig):
    """Token ids as given: an .npy file of int32 or int64 `[rows, width]`, each row a document."""

    sets_sequence_length: ClassVar[bool] = True

    _target_: str = "dsv3.data.token_table.TokensData"
    path: str | None = field(default=None, metadata=PATH)
    """An .npy file of token ids, int32 or int64 [rows, width]; rows are `width - 1` tokens long."""

    def validate(self) -> None:
        """Raise InvalidValue for a missing path."""
        super().validate()
        require(bool(self.path), "path", self.path, "give a file of ids [rows, width], data.path=FILE.npy")


@dataclass
class TokenizerConfig(Buildable):
    """The base of every tokenizer's config."""

    _target_: str = "???"


@schema("tokenizer/trained")
@dataclass
class TrainedTokenizerConfig(TokenizerConfig):
    """A byte-level BPE trained on the training side of the corpus."""

    _target_: str = "dsv3.data.tokenizer.TrainedTokenizer"
    vocab_size: int = 4096
    """Most token ids, including 256 bytes and 6 special tokens; a small corpus may yield fewer."""

    def validate(self) -> None:
        """Raise InvalidValue for a vocabulary that cannot hold the bytes and the special tokens."""
        allowed = f"must be at least {SMALLEST_VOCABULARY} (256 bytes, 6 special tokens and some merges)"
        require(self.vocab_size >= SMALLEST_VOCABULARY, "vocab_size", self.vocab_size, allowed)


@schema("tokenizer/local")
@dataclass
class LocalTokenizerConfig(TokenizerConfig):
    """A tokenizer on disk: a tokenizer.json or tiktoken.model, or a directory that holds one."""

    _target_: str = "dsv3.data.tokenizer.LocalTokenizer"
    path: str | None = field(default=None, metadata=PATH)
    """A tokenizer.json or tiktoken.model, or a directory that holds one with what is beside it."""

    def validate(self) -> None:
        """Raise InvalidValue for a missing path."""
        allowed = "give a tokenizer.json or a directory that holds one, tokenizer.path=PATH"
        require(bool(self.path), "path", self.path, allowed)
