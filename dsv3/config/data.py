"""Schemas of the `data` and `tokenizer` groups."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import ClassVar

from dsv3.config.registry import PATH, PATH_OR_NAME, Buildable, schema
from dsv3.errors import UserError, require

ROW_ORDER = 2
"""Number of the order in which rows are read, and those of a table held out; code that changes it adds 1."""

MOST_LANES = 64
"""Streams that data=hf reads a dataset in where their number is not given."""

SMALLEST_VOCABULARY = 264  # 256 bytes, 6 special tokens, and 2 merges so that there is something to learn


def cache_root(cache_dir: str | None, environment: Mapping[str, str] | None = None) -> Path:
    """Return `cache_dir` where it is set, else $DSV3_CACHE, else $XDG_CACHE_HOME/dsv3, else ~/.cache/dsv3."""
    variables = os.environ if environment is None else environment
    if cache_dir or variables.get("DSV3_CACHE"):
        return Path(cache_dir or variables["DSV3_CACHE"]).expanduser()
    base = variables.get("XDG_CACHE_HOME")
    return Path(base) / "dsv3" if base else Path("~/.cache/dsv3").expanduser()


class Packing(Enum):
    """The ways to make rows of documents."""

    concat = "concat"
    """Documents are joined and cut into rows without padding."""
    best_fit = "best_fit"
    """Rows hold whole documents and are padded; documents longer than a row are cut."""


class IdType(Enum):
    """The dtypes of flat files of ids, little-endian."""

    uint8 = "uint8"
    uint16 = "uint16"
    """nanoGPT's, and of every vocabulary of up to 65,536 ids."""
    uint32 = "uint32"
    int32 = "int32"
    int64 = "int64"


class Verify(Enum):
    """The part of given ids that is read when a run starts; each id is checked again when it is read."""

    sample = "sample"
    """Sizes and headers of all files, and per rank 33 million ids from all over its share."""
    all = "all"
    """Every id and offset, and every digest that an index tells, a share per rank."""


@dataclass
class DataConfig(Buildable):
    """The fields that every source of training text has."""

    sets_sequence_length: ClassVar[bool] = False
    """True where rows have a length of their own, the source's `sequence_length`; else text is packed."""
    holds_ids: ClassVar[bool] = False
    """True where the data is token ids already: no tokenizer is trained for it."""

    in_mixture: ClassVar[bool] = True
    """True where the source may be one of a mixture."""

    _target_: str = "???"  # OmegaConf's mark of a missing value: only the choices below can be built
    document_mask: bool = False
    """Keep attention within a document; off, as in the DeepSeek-V3 report (section 4.1)."""
    held_out: float = 0.03
    """Share of the documents set aside for evaluation, chosen by the hash of their content."""
    shuffle: bool = True
    """Permute documents and rows anew in every epoch; off keeps the order of the files."""
    packing: Packing = Packing.concat
    """Rows are cut from joined documents (concat), or hold whole ones and padding (best_fit)."""
    fim_rate: float = 0.0
    """Share of training documents rearranged for fill-in-the-middle (PSM); 0.1 in DeepSeek-V3's report."""
    cache_dir: str | None = field(default=None, metadata=PATH)
    """Directory of prepared tokens; null is $DSV3_CACHE, else $XDG_CACHE_HOME/dsv3, else ~/.cache/dsv3."""
    allow_change: bool = field(default=False, metadata={"argument": False})
    """Go on with a run although its data changed; counts for the command that types it, and is recorded."""

    def completed(self, batch: int, is_ramped: bool) -> "DataConfig":
        """Return the config with what follows from the global batch in sequences, and whether it grows."""
        return self

    def notes(self, ranks: int) -> list[str]:
        """Return lines on what the number of data-parallel ranks does to reading the data."""
        return []

    @property
    def caches(self) -> bool:
        """Return True where something is kept in cache_dir."""
        return True

    def validate(self) -> None:
        """Raise InvalidValue for a held-out share that leaves too little on either side, and for no share."""
        require(0 < self.held_out < 0.5, "held_out", self.held_out, "must be above 0 and below 0.5")
        require(0 <= self.fim_rate <= 1, "fim_rate", self.fim_rate, "must be a share, from 0 to 1")


@schema("data/stdlib")
@dataclass
class StdlibDataConfig(DataConfig):
    """The Python standard library of the running interpreter; needs no download."""

    _target_: str = "dsv3.data.sources.StdlibData"


@dataclass
class DocumentFilesConfig(DataConfig):
    """The fields of what reads files of documents: text, JSON lines, Parquet."""

    field: str = "text"
    """Field or column that holds a document's text, in JSON lines, Parquet and datasets."""
    separator: str | None = None
    """Text between documents of a file, \\n and \\t for line end and tab; null: a file is one document."""
    max_skipped: float = 0.01
    """Share of the documents, and of the files, that may be skipped as unreadable; more are refused."""

    def validate(self) -> None:
        """Raise InvalidValue as above, and for what makes no documents of files."""
        super().validate()
        self.validate_reading()

    def validate_reading(self) -> None:
        """Raise InvalidValue for an empty field or separator and for a share that is none."""
        require(bool(self.field), "field", self.field, "name the field that holds the text")
        require(self.separator != "", "separator", "''", "give the text between documents, or null")
        allowed = "must be at least 0 (refuse all) and at most 1"
        require(0 <= self.max_skipped <= 1, "max_skipped", self.max_skipped, allowed)


@schema("data/input")
@dataclass
class InputDataConfig(DocumentFilesConfig):
    """The documents that task=prepare reads: task.input says where they are."""

    in_mixture: ClassVar[bool] = False

    _target_: str = "dsv3.tokens.prepare_shards.InputData"

    def validate(self) -> None:
        """Raise InvalidValue as above, but allow no held-out side."""
        require(0 <= self.held_out < 0.5, "held_out", self.held_out, "must be at least 0 and below 0.5")
        self.validate_reading()


@schema("data/text")
@dataclass
class TextDataConfig(DocumentFilesConfig):
    """The user's own text: a file, or a folder of files."""

    _target_: str = "dsv3.data.sources.TextData"
    path: str | None = field(default=None, metadata=PATH)
    """Text file, or folder of text files."""

    def validate(self) -> None:
        """Raise InvalidValue for a missing path."""
        super().validate()
        require(bool(self.path), "path", self.path, "give a text file or a folder, data.path=FILE_OR_FOLDER")


@dataclass
class IdsDataConfig(DataConfig):
    """The fields of data that is token ids already."""

    holds_ids: ClassVar[bool] = True

    path: str | None = field(default=None, metadata=PATH)
    """File or folder of token ids."""
    verify: Verify = Verify.sample
    """What is read at start to find damage: a sample, or all; each id is checked again when it is read."""

    @property
    def caches(self) -> bool:
        """Return True where something is kept in cache_dir; ids that are read in place are not."""
        return False

    def validate(self) -> None:
        """Raise InvalidValue for a missing path."""
        super().validate()
        require(bool(self.path), "path", self.path, "give the files of ids, data.path=FILE_OR_FOLDER")


@schema("data/tokens")
@dataclass
class TokensDataConfig(IdsDataConfig):
    """Rows of token ids as given: .npy files of whole numbers `[rows, width]`, each row a document."""

    sets_sequence_length: ClassVar[bool] = True

    _target_: str = "dsv3.data.token_table.TokensData"
    path: str | None = field(default=None, metadata=PATH)
    """An .npy file of token ids [rows, width], or a folder of them; rows are `width - 1` tokens long."""
    pad_id: int | None = None
    """The id of padding, cut out of each row wherever it stands; -100 always is padding."""

    def validate(self) -> None:
        """Raise InvalidValue for what changes documents: rows are taken as they are."""
        super().validate()
        allowed = "must be concat: rows are taken as they are; data=shards packs documents"
        require(self.packing is Packing.concat, "packing", self.packing.name, allowed)
        allowed = "must be 0: rows are taken as they are; data=shards rearranges documents"
        require(self.fim_rate == 0, "fim_rate", self.fim_rate, allowed)


@schema("data/shards")
@dataclass
class ShardsDataConfig(IdsDataConfig):
    """Documents of token ids: shards of task=prepare, Megatron's .bin/.idx, litgpt's, flat .bin, 1-D .npy."""

    _target_: str = "dsv3.data.token_shards.ShardsData"
    path: str | None = field(default=None, metadata=PATH)
    """Directory of token shards, file or folder of other tools, pattern with *, or URL of token shards."""
    held_out_path: str | None = field(default=None, metadata=PATH)
    """What is scored, in place of a share of data.path; null: what the files mark, else data.held_out."""
    dtype: IdType | None = None
    """Dtype of flat .bin files without a header."""
    eos_id: int | None = None
    """The id that ends each document of flat files; null: a file is one document."""
    cache_bytes: int = 64 * 2**30
    """Bytes of remote shards that a node keeps in data.cache_dir."""

    @property
    def caches(self) -> bool:
        """Return True where something is kept in cache_dir: ends of documents, rows, or remote blocks."""
        return self.eos_id is not None or self.packing is Packing.best_fit or "://" in (self.path or "")

    def validate(self) -> None:
        """Raise InvalidValue for an id or a size that is none."""
        super().validate()
        require(self.eos_id is None or self.eos_id >= 0, "eos_id", self.eos_id, "must be an id, at least 0")
        require(self.cache_bytes > 0, "cache_bytes", self.cache_bytes, "must be above 0")


@schema("data/hf")
@dataclass
class HubDataConfig(DataConfig):
    """A dataset of the HuggingFace hub, or a directory of one, tokenized while it streams."""

    in_mixture: ClassVar[bool] = False

    _target_: str = "dsv3.data.hub_stream.HubData"
    dataset: str | None = field(default=None, metadata=PATH_OR_NAME)
    """OWNER/NAME on the hub, or a directory of text, JSON lines or Parquet."""
    subset: str | None = None
    """Configuration of the dataset where it has several; null is its default."""
    revision: str | None = None
    """Commit, tag or branch on the hub; null is the newest. A commit keeps the data as it is."""
    split: str = "train"
    """Split to train on."""
    held_out_split: str | None = None
    """Split to evaluate on, about its first million tokens; null sets documents of `split` aside."""
    lanes: int | None = None
    """Streams that the dataset is read in, one per data-parallel rank or more; null: up to 64."""
    lane_rows: int | None = None
    """Consecutive sequences of a batch that one lane supplies; null: global_batch_size / lanes."""
    shuffled_documents: int = 1024
    """Documents of a file, at most, that are shuffled among one another; fewer where 8 MB hold fewer."""
    field: str = "text"
    """Column that holds a document's text."""

    def validate(self) -> None:
        """Raise InvalidValue for a missing dataset, and for what a stream cannot do."""
        super().validate()
        require(bool(self.dataset), "dataset", self.dataset, "give OWNER/NAME of the hub, or a directory")
        prepared = "a stream is packed by concat alone: make shards with task=prepare, for data=shards"
        require(self.packing is Packing.concat, "packing", self.packing.name, prepared)
        require(self.fim_rate == 0, "fim_rate", self.fim_rate, "must be 0: make shards with task=prepare")
        for name in ("lanes", "lane_rows", "shuffled_documents"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "must be positive")

    def completed(self, batch: int, is_ramped: bool) -> "HubDataConfig":
        """Return the config with lanes and rows per lane; UserError for a batch that grows."""
        if is_ramped:
            raise UserError(
                "data=hf cannot follow train.batch_ramp, its streams are bound to the slots of a batch: make "
                "shards, task=prepare task.input=hf:OWNER/NAME task.output=DIR, and read data=shards"
            )
        divisors = [number for number in range(1, batch + 1) if batch % number == 0]
        lanes = self.lanes or max(number for number in divisors if number <= MOST_LANES)
        nearest = min(divisors, key=lambda number: abs(number - lanes))
        allowed = f"must divide train.global_batch_size={batch}: use data.lanes={nearest}"
        require(self.lane_rows is not None or batch % lanes == 0, "data.lanes", lanes, allowed)
        return replace(self, lanes=lanes, lane_rows=self.lane_rows or batch // lanes)

    def notes(self, ranks: int) -> list[str]:
        """Return a line where lanes are read by several of the data-parallel ranks."""
        if self.lanes is None or self.lanes % ranks == 0:
            return []
        return [
            f"data.lanes={self.lanes} is no multiple of the {ranks} data-parallel ranks: some tokenize what "
            "others train on; a new run with such a data.lanes does without"
        ]


@dataclass
class TokenizerConfig(Buildable):
    """The base of every tokenizer's config."""

    _target_: str = "???"


@schema("tokenizer/trained")
@dataclass
class TrainedTokenizerConfig(TokenizerConfig):
    """A byte-level BPE trained on the training side of the corpus."""

    _target_: str = "dsv3.tokens.tokenizer.TrainedTokenizer"
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

    _target_: str = "dsv3.tokens.tokenizer.LocalTokenizer"
    path: str | None = field(default=None, metadata=PATH)
    """A tokenizer.json or tiktoken.model, or a directory that holds one with what is beside it."""

    def validate(self) -> None:
        """Raise InvalidValue for a missing path."""
        allowed = "give a tokenizer.json or a directory that holds one, tokenizer.path=PATH"
        require(bool(self.path), "path", self.path, allowed)
