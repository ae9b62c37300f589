"""The choices of `data` and `tokenizer`: what may be set, and what cannot be right."""

from dataclasses import dataclass
from typing import ClassVar

from dsv3.errors import require

SMALLEST_VOCABULARY = 264  # 256 bytes, 6 special tokens, and 2 merges so that there is something to learn


@dataclass
class DataConfig:
    """What every source of training text has in common."""

    sets_sequence_length: ClassVar[bool] = False
    """Rows have a length of their own: the source's `sequence_length`; else text is packed to any."""

    _target_: str = "???"  # OmegaConf's mark of a missing value: only the choices below can be built
    _recursive_: bool = False
    _convert_: str = "object"
    document_mask: bool = False
    """Attention stays within a document. Off, as in the DeepSeek-V3 report (section 4.1)."""
    held_out: float = 0.03
    """Share of the documents set aside for evaluation, chosen by the hash of their content."""
    shuffle: bool = True
    """Permute documents and rows anew in every epoch; off keeps the order of the files."""
    cache_dir: str | None = None
    """Where prepared tokens live: null is $DSV3_CACHE, else $XDG_CACHE_HOME/dsv3, else ~/.cache/dsv3."""

    def validate(self) -> None:
        """Refuse a held-out share that leaves too little on either side."""
        require(0 < self.held_out < 0.5, "held_out", self.held_out, "must be above 0 and below 0.5")


@dataclass
class StdlibDataConfig(DataConfig):
    """The Python standard library of the running interpreter: needs no download."""

    _target_: str = "dsv3.data.sources.StdlibData"


@dataclass
class TextDataConfig(DataConfig):
    """The user's own text: a file, or a folder of files."""

    _target_: str = "dsv3.data.sources.TextData"
    path: str | None = None

    def validate(self) -> None:
        """Refuse a missing path."""
        super().validate()
        require(bool(self.path), "path", self.path, "give a text file or a folder, data.path=FILE_OR_FOLDER")


@dataclass
class TokensDataConfig(DataConfig):
    """Token ids as given: an .npy file of int32 or int64 `[rows, width]`, each row a document."""

    sets_sequence_length: ClassVar[bool] = True

    _target_: str = "dsv3.data.token_table.TokensData"
    path: str | None = None

    def validate(self) -> None:
        """Refuse a missing path."""
        super().validate()
        require(bool(self.path), "path", self.path, "give a file of ids [rows, width], data.path=FILE.npy")


@dataclass
class TokenizerConfig:
    """What every choice of tokenizer has in common."""

    _target_: str = "???"
    _recursive_: bool = False
    _convert_: str = "object"


@dataclass
class TrainedTokenizerConfig(TokenizerConfig):
    """A byte-level BPE trained on the training side of the corpus."""

    _target_: str = "dsv3.data.tokenizer.TrainedTokenizer"
    vocab_size: int = 4096
    """Ids at most, the 256 bytes and 6 special tokens included; a small corpus may yield fewer."""

    def validate(self) -> None:
        """Refuse a vocabulary that cannot hold the bytes and the special tokens."""
        allowed = f"must be at least {SMALLEST_VOCABULARY} (256 bytes, 6 special tokens and some merges)"
        require(self.vocab_size >= SMALLEST_VOCABULARY, "vocab_size", self.vocab_size, allowed)


@dataclass
class LocalTokenizerConfig(TokenizerConfig):
    """A tokenizer on disk: a tokenizer.json, or a directory that holds one."""

    _target_: str = "dsv3.data.tokenizer.LocalTokenizer"
    path: str | None = None

    def validate(self) -> None:
        """Refuse a missing path."""
        allowed = "give a tokenizer.json or a directory that holds one, tokenizer.path=PATH"
        require(bool(self.path), "path", self.path, allowed)
