"""The data sources `data=stdlib` and `data=text`: from a corpus to training rows and held-out rows."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dsv3.data.cache import cache_root
from dsv3.data.corpus import Corpus, Document, HeldOutSplit, StdlibCorpus, TextCorpus
from dsv3.data.packing import PackedDataset, PackedEvaluationDataset, RowDataset
from dsv3.data.token_file import FORMAT, TokenFile, load_or_tokenize
from dsv3.data.tokenizer import LocalTokenizer, Tokenizer, TokenizerSource
from dsv3.errors import UserError
from dsv3.metrics.progress import amount, phase


@dataclass(frozen=True)
class PreparedData:
    """Data ready for the data loader.

    Attributes:
        train: rows without end; None when prepared for evaluation only.
        held_out: rows to score, each once.
        tokenizer: None for data that is token ids already.
        fingerprint: 16 hex characters, the same for the same data.
        summary: counts to show the user and to record.
    """

    train: RowDataset | None
    held_out: RowDataset
    tokenizer: Tokenizer | None
    fingerprint: str
    summary: dict[str, int]

    @property
    def sequence_length(self) -> int:
        """Return the tokens per row without the one after it; data of token ids sets it itself."""
        return self.held_out.sequence_length

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """Return the fingerprint of the tokenizer; None for data that is token ids already."""
        return self.tokenizer.fingerprint() if self.tokenizer else None

    def check_vocabulary(self, vocab_size: int) -> None:
        """Check that a model of `vocab_size` ids has an embedding for every id.

        Raises:
            UserError: the tokenizer, or an id, goes beyond the vocabulary.
        """
        size = self.tokenizer.size if self.tokenizer else 0
        if size > vocab_size:
            raise UserError(
                f"the tokenizer has {size} ids, model.vocab_size={vocab_size} is too small for it: "
                f"use model.vocab_size={size} or a smaller tokenizer"
            )


class CorpusData:
    """Text of a corpus, split by document, tokenized once and kept in the cache.

    Args:
        document_mask: read by the model's side; the rows carry document ids in any case.
        held_out: fraction of the documents to hold out.
        shuffle: whether documents and rows are shuffled in every epoch.
        cache_dir: the folder of prepared tokens; None for the default.
    """

    def __init__(
        self,
        document_mask: bool = False,
        held_out: float = 0.03,
        shuffle: bool = True,
        cache_dir: str | None = None,
    ) -> None:
        self.document_mask = document_mask
        self.held_out = held_out
        self.shuffle = shuffle
        self.cache_dir = cache_dir

    def corpus(self) -> Corpus:
        """Return the documents."""
        raise NotImplementedError

    def prepare(
        self,
        tokenizer_source: TokenizerSource | Tokenizer,
        sequence_length: int,
        seed: int,
        evaluate: bool = False,
    ) -> PreparedData:
        """Read, split, tokenize and pack the corpus; tokenizer and tokens come from the cache where they can.

        Args:
            tokenizer_source: a choice of `tokenizer`, or an existing tokenizer.
            sequence_length: tokens per row.
            seed: seed of the shuffling; the split does not depend on it.
            evaluate: prepare only the held-out side.

        Raises:
            UserError: there is no text or too little of it, or the cache cannot be written.
        """
        split = HeldOutSplit(self.corpus(), self.held_out)
        root = cache_root(self.cache_dir)
        contents = f"{split.corpus.fingerprint()} {self.held_out!r} {FORMAT}"
        key = hashlib.sha256(contents.encode()).hexdigest()[:16]
        if isinstance(tokenizer_source, Tokenizer):
            tokenizer = tokenizer_source
        else:
            texts = (document.text for document in split.training())  # held-out text must not shape it
            title = f"training the tokenizer on {amount(split.training_size, 'characters')}"
            if isinstance(tokenizer_source, LocalTokenizer):
                title = "loading the tokenizer"
            with phase(title, each_node=True):
                tokenizer = tokenizer_source.prepare(texts, root / f"tokenizer-{key}")
        prefix = f"tokens-{key}-{tokenizer.fingerprint()}"

        def tokenize(read: Callable[[Callable[[int], None]], Iterator[Document]], side: str) -> TokenFile:
            title = {"train": "training", "held_out": "held-out"}[side]
            with phase(f"tokenizing the {title} text", split.size, "characters", each_node=True) as work:
                texts = (document.text for document in read(work.advance))
                return load_or_tokenize(root / f"{prefix}-{side}", tokenizer, texts)

        held_out = tokenize(split.evaluation, "held_out")
        summary = {
            "documents_read": len(split.corpus.infos()),
            "duplicates_dropped": split.duplicates,
            "files_skipped": split.corpus.skipped,
            "files_empty": split.corpus.empty,
            "characters_train": split.training_size,
            "vocabulary": tokenizer.size,
            "documents_held_out": held_out.num_documents,
            "tokens_held_out": len(held_out.tokens),
        }
        train = None
        if not evaluate:
            tokens = tokenize(split.training, "train")
            train = PackedDataset(tokens.tokens, tokens.offsets, sequence_length, seed, self.shuffle)
            summary["documents_train"] = tokens.num_documents
            summary["tokens_train"] = len(tokens.tokens)
            summary["rows_per_epoch"] = len(train)
            summary["tokens_left_out"] = len(tokens.tokens) - 1 - len(train) * sequence_length
        rows = PackedEvaluationDataset(held_out.tokens, held_out.offsets, sequence_length)
        return PreparedData(train, rows, tokenizer, split.corpus.fingerprint(), summary)


class StdlibData(CorpusData):
    """`data=stdlib`: the Python standard library of the running interpreter."""

    def corpus(self) -> Corpus:
        """Return the library's own sources, without its tests."""
        return StdlibCorpus()


class TextData(CorpusData):
    """`data=text`: the user's own file or folder.

    Raises:
        UserError: `path` is not given.
    """

    def __init__(
        self,
        document_mask: bool = False,
        held_out: float = 0.03,
        shuffle: bool = True,
        cache_dir: str | None = None,
        path: str | None = None,
    ) -> None:
        super().__init__(document_mask, held_out, shuffle, cache_dir)
        if not path:
            raise UserError("data.path is not set: give a text file or a folder, data.path=FILE_OR_FOLDER")
        self.path = path

    def corpus(self) -> Corpus:
        """Return the text files at `path`."""
        return TextCorpus(self.path)
