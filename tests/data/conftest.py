"""Small corpora, and the shortest way from one to prepared data."""

from pathlib import Path

import numpy as np
import pytest

from dsv3.tokens.shuffle import Ids
from tests.data.texts import sentence


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of 120 different texts and of 3 copies of the first."""
    root = tmp_path / "corpus"
    (root / "deep").mkdir(parents=True)
    for number in range(120):
        (root / ("deep" if number % 3 else ".") / f"{number:03}.txt").write_text(sentence(number))
    for copy in ("a.txt", "deep/z.txt", "zz.txt"):
        (root / copy).write_text(sentence(0))
    return root


@pytest.fixture
def documents() -> tuple[Ids, Ids]:
    """Return 50 documents of 1 to 19 tokens as (tokens, offsets); no token occurs twice."""
    lengths = np.random.default_rng(0).integers(1, 20, 50)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return np.arange(1000, 1000 + offsets[-1]), offsets
