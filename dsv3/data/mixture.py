"""The data source `data=mixture`: rows of several sources by weight, their held-out rows side by side."""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from dsv3.config.mixture import SOURCES, MixtureDataConfig, read_sources, weight_at
from dsv3.config.strict import build
from dsv3.data.mixture_order import MixtureOrder, Stage, source_seed
from dsv3.data.packing import PackedRow, RowDataset
from dsv3.data.rows import RowOptions
from dsv3.data.sources import NoTexts, PreparedData
from dsv3.errors import UserError
from dsv3.metrics.progress import amount, phase
from dsv3.tokens.cache import CacheEntryError, cache_root
from dsv3.tokens.data_record import DataRecord
from dsv3.tokens.tokenizer import LocalTokenizer, Tokenizer, TokenizerSource, training_patience

_COUNTED = ("documents", "tokens", "rows", "files", "duplicates", "characters")
"""Beginnings of the names of counts that sources add up to."""


@runtime_checkable
class HasTexts(Protocol):
    """A source of text, from which a tokenizer can be trained."""

    def training_texts(self) -> tuple[Iterator[str], str, int]:
        """Return the texts of the training side, their fingerprint, and their characters."""


class MixtureRows:
    """Training rows of several sources in the order of a mixture."""

    def __init__(self, sources: Mapping[str, RowDataset], order: MixtureOrder) -> None:
        self._sources, self._order = list(sources.values()), order
        self.sequence_length = self._sources[0].sequence_length

    def __len__(self) -> int:
        """Return the rows of one epoch of every source; a mixture has no epoch of its own."""
        return sum(map(len, self._sources))

    def row(self, index: int) -> PackedRow:
        """Return the row of sample `index` >= 0, from the source whose turn it is."""
        source, number = self._order.locate(index)
        return self._sources[source].row(number)


class HeldOutSources:
    """The held-out rows of several sources, one source after the other."""

    def __init__(self, sources: Mapping[str, RowDataset]) -> None:
        self.sources = dict(sources)
        self._parts = list(self.sources.values())
        self.starts = [0, *accumulate(map(len, self._parts))]
        self.sequence_length = self._parts[0].sequence_length

    def __len__(self) -> int:
        return self.starts[-1]

    def row(self, index: int) -> PackedRow:
        """Return the row at `index`, 0 <= index < len."""
        part = bisect_right(self.starts, index) - 1
        return self._parts[part].row(index - self.starts[part])


@dataclass(frozen=True)
class PreparedMixture(PreparedData):
    """A mixture, ready for the data loader.

    Attributes:
        sources: the prepared sources by name, in the order in which `order` counts them.
        order: the source of every sample.
    """

    sources: dict[str, PreparedData]
    order: MixtureOrder

    def check_vocabulary(self, vocab_size: int, share: tuple[int, int] = (0, 1)) -> None:
        """Check every source; UserError as for PreparedData."""
        for source in self.sources.values():
            source.check_vocabulary(vocab_size, share)

    def check_digests(self, share: tuple[int, int] = (0, 1)) -> None:
        """Compare the files of every source with their digests; UserError as for PreparedData."""
        for source in self.sources.values():
            source.check_digests(share)

    def verify_newer(self, since: float) -> None:
        """Compare the newer files of every source with their digests; UserError as for PreparedData."""
        for source in self.sources.values():
            source.verify_newer(since)

    def progress(self, samples: int) -> dict[str, dict[str, float | None]]:
        """Return by source the tokens and the epochs of it that the first `samples` samples hold."""
        counts = zip(self.sources.items(), self.order.counts(samples), strict=True)
        return {
            name: {"tokens": count * self.sequence_length, "epochs": count / len(source.train)}
            for (name, source), count in counts
            if source.train is not None
        }


class MixtureRecipe(NamedTuple):
    """Reopens a mixture in another process."""

    sources: dict[str, Any]
    """The recipe of each source."""
    tokenizer: str | None
    """Prefix of the entry of a tokenizer that was trained on the text of several sources."""


class MixtureData:
    """`data=mixture`: see MixtureDataConfig; `common` are the fields of RowOptions."""

    def __init__(self, sources: dict[str, Any], **common: Any) -> None:
        self.options = RowOptions(**common)
        self._sources = read_sources(MixtureDataConfig(sources=sources, **common))
        self._parts = {}
        for source in self._sources:
            with _naming(source.name):
                self._parts[source.name] = build(source.config)

    def prepare(
        self,
        tokenizer_source: TokenizerSource | Tokenizer,
        sequence_length: int,
        seed: int,
        evaluate: bool = False,
    ) -> PreparedMixture:
        """Prepare every source, all with one tokenizer.

        That is the given one; else, in place of one to be trained, that of a source that brings its own; else
        one that is trained on the training text of all sources of text.

        Raises:
            UserError: a source cannot be prepared, has other ids or rows of another length.
        """

        def prepare(name: str, tokenizer: TokenizerSource | Tokenizer) -> PreparedData:
            return self._prepare(name, tokenizer, sequence_length, seed, evaluate)

        prepared, tokenizer, trained = self._with_one_tokenizer(
            prepare, tokenizer_source, self._train_tokenizer
        )
        return self._mix(prepared, tokenizer, trained, sequence_length, seed)

    def reopen(
        self,
        recipe: MixtureRecipe,
        tokenizer_source: TokenizerSource | Tokenizer,
        sequence_length: int,
        seed: int,
        evaluate: bool = False,
    ) -> PreparedMixture:
        """Return what `prepare` has returned elsewhere, from the cache; what has no recipe is prepared.

        Raises:
            CacheEntryError: this machine's cache does not have it.
        """

        def reopen(name: str, tokenizer: TokenizerSource | Tokenizer) -> PreparedData:
            own = recipe.sources[name]
            if own is None:
                return self._prepare(name, tokenizer, sequence_length, seed, evaluate)
            how = self._arguments(name, tokenizer, sequence_length, seed, evaluate)
            found: PreparedData = self._parts[name].reopen(own, *how)
            return found

        def read_trained(source: TokenizerSource) -> tuple[Tokenizer, str]:
            if recipe.tokenizer is None:
                raise CacheEntryError("the mixture's tokenizer is not known")
            return source.prepare(NoTexts(), self._cache / recipe.tokenizer), recipe.tokenizer

        prepared, tokenizer, trained = self._with_one_tokenizer(reopen, tokenizer_source, read_trained)
        return self._mix(prepared, tokenizer, trained, sequence_length, seed)

    @property
    def _cache(self) -> Path:
        return cache_root(self.options.cache_dir)

    def _prepare(
        self,
        name: str,
        tokenizer: TokenizerSource | Tokenizer,
        sequence_length: int,
        seed: int,
        evaluate: bool,
    ) -> PreparedData:
        with _naming(name):
            found: PreparedData = self._parts[name].prepare(
                *self._arguments(name, tokenizer, sequence_length, seed, evaluate)
            )
        return found

    def _arguments(
        self, name: str, tokenizer: TokenizerSource | Tokenizer, length: int, seed: int, evaluate: bool
    ) -> tuple[TokenizerSource | Tokenizer, int, int, bool]:
        """Return what a source is prepared and reopened with; of ids that are given both sides, always.

        For an evaluation alone all of them would be scored.
        """
        config = next(source.config for source in self._sources if source.name == name)
        return tokenizer, length, source_seed(seed, name), evaluate and not config.holds_ids

    def _with_one_tokenizer(
        self,
        prepare: Callable[[str, TokenizerSource | Tokenizer], PreparedData],
        given: TokenizerSource | Tokenizer,
        train: Callable[[TokenizerSource], tuple[Tokenizer, str]],
    ) -> tuple[dict[str, PreparedData], Tokenizer | None, str | None]:
        """Return the prepared sources by name, their tokenizer, and its place in the cache if trained."""
        if isinstance(given, LocalTokenizer):
            with phase("loading the tokenizer", each_node=True):
                given = given.prepare()
        texts = [name for name, part in self._parts.items() if isinstance(part, HasTexts)]
        done = {name: prepare(name, given) for name in self._parts if name not in texts}
        tokenizer = given if isinstance(given, Tokenizer) else None
        trained = None
        if tokenizer is None:
            tokenizer = next((part.tokenizer for part in done.values() if part.tokenizer is not None), None)
        if tokenizer is None and texts:
            assert not isinstance(given, Tokenizer)
            tokenizer, trained = train(given)
        if tokenizer is not None:
            done |= {name: prepare(name, tokenizer) for name in texts}
        return {name: done[name] for name in self._parts}, tokenizer, trained

    def _train_tokenizer(self, source: TokenizerSource) -> tuple[Tokenizer, str]:
        """Train a tokenizer on the text of all sources of text; return it and its place in the cache."""
        found = [part.training_texts() for part in self._parts.values() if isinstance(part, HasTexts)]
        characters = sum(size for _, _, size in found)
        content = " ".join(fingerprint for _, fingerprint, _ in found)
        name = f"tokenizer-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
        title = f"training the tokenizer on {amount(characters, 'characters')}"
        with phase(title, each_node=True, patience=training_patience(characters)):
            return source.prepare(
                chain.from_iterable(texts for texts, _, _ in found), self._cache / name
            ), name

    def _mix(
        self,
        prepared: dict[str, PreparedData],
        tokenizer: Tokenizer | None,
        trained: str | None,
        sequence_length: int,
        seed: int,
    ) -> PreparedMixture:
        """Return the mixture of prepared sources; UserError where they do not fit together."""
        _require_one_tokenizer(prepared)
        for name, part in prepared.items():
            if part.sequence_length != sequence_length:
                raise UserError(
                    f"{SOURCES}.{name} has rows of {part.sequence_length} tokens, as wide as its file says; "
                    f"rows of a mixture have one length: train.sequence_length={part.sequence_length}"
                )
        order = MixtureOrder(self._stages(sequence_length), seed if self.options.shuffle else None)
        held_out = HeldOutSources({name: part.held_out for name, part in prepared.items()})
        train = {name: part.train for name, part in prepared.items() if part.train is not None}
        rows = MixtureRows(train, order) if train.keys() == prepared.keys() else None
        shares = {source.name: source.config.held_out for source in self._sources}
        content = "".join(f"{name} {part.fingerprint} {shares[name]!r}\n" for name, part in prepared.items())
        fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]
        recipe = MixtureRecipe({name: part.recipe for name, part in prepared.items()}, trained)
        return PreparedMixture(
            rows,
            held_out,
            tokenizer,
            fingerprint,
            _summary(prepared, tokenizer),
            prepared,
            order,
            recipe=recipe,
            record=DataRecord.joined({name: part.record for name, part in prepared.items()}),
            is_shared=all(part.is_shared for part in prepared.values()),
        )

    def _stages(self, sequence_length: int) -> list[Stage]:
        """Return the stages of constant weights; one begins with the first sample behind its tokens."""
        weights = [source.weights for source in self._sources]
        starts = sorted({start for own in weights for start, _ in own})
        stages = {-(-start // sequence_length): start for start in starts}  # of two at one sample the later
        return [
            Stage(first, tuple(weight_at(own, tokens) for own in weights)) for first, tokens in stages.items()
        ]


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Let an error say of which source it is: a source itself knows no name, and calls its keys data.X."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{SOURCES}.{source}: {error}") from error


def _require_one_tokenizer(prepared: Mapping[str, PreparedData]) -> None:
    """Raise UserError where two sources have ids of different tokenizers."""
    known = {name: print_ for name, part in prepared.items() if (print_ := part.tokenizer_fingerprint)}
    for name, fingerprint in known.items():
        first = next(iter(known))
        if fingerprint != known[first]:
            raise UserError(
                f"{SOURCES}.{first} has ids of the tokenizer {known[first]}, {SOURCES}.{name} those of "
                f"{fingerprint}: a mixture has one; prepare both with tokenizer=local tokenizer.path=PATH"
            )


def _summary(prepared: Mapping[str, PreparedData], tokenizer: Tokenizer | None) -> dict[str, int]:
    """Return the counts of all sources together, and of each by NAME.COUNT."""
    total: dict[str, int] = {}
    own: dict[str, int] = {}
    for name, part in prepared.items():
        own |= {f"{name}.{key}": value for key, value in part.summary.items()}
        for key, value in part.summary.items():
            if key.startswith(_COUNTED) and isinstance(value, int):
                total[key] = total.get(key, 0) + value
    if tokenizer is not None:
        total["vocabulary"] = tokenizer.size
    return total | own
