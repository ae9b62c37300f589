"""Ranks prepare data: one of them reads the corpus for all, and each a share of given token ids."""

from pathlib import Path

import numpy as np
import pytest

from dsv3.config.root import Config
from tests.data.texts import sentence
from tests.harness.pool import Pool
from tests.parallel.tiny_training import configured
from tests.tasks.worker_prepare_data import prepare

FILES = 40


def text_config(folder: Path, files: int) -> Config:
    folder.mkdir()
    for number in range(files):
        (folder / f"{number:03}.txt").write_text(sentence(number))
    sizes = ["model.vocab_size=300", "tokenizer.vocab_size=300"]
    return configured(["data=text", f"data.path={folder}", *sizes], 2)


def test_one_rank_reads_the_corpus_for_all(pool: Pool, tmp_path: Path) -> None:
    config = text_config(tmp_path / "corpus", FILES)
    shared = [tmp_path / "shared"] * 2
    first = pool.run(prepare, config, shared)
    # The scan, the tokenizer and the tokens of both sides are a pass each; a warm start reads no text.
    assert [rank.files for rank in first] == [4 * FILES, *[0] * 7]
    warm = pool.run(prepare, config, shared)
    assert [rank.files for rank in warm] == [0] * 8
    # Scan, tokenizer and both sides once per node; the second node reads no scan.
    assert [rank.verified for rank in warm] == [4, 0, 0, 0, 3, 0, 0, 0]
    # A node with a cache of its own fills it, once.
    apart = pool.run(prepare, config, [tmp_path / "shared", tmp_path / "own"])
    assert [rank.files for rank in apart] == [0, 0, 0, 0, 4 * FILES, 0, 0, 0]
    # A bit flips in one node's cache: its first rank reads the text anew, the others read sound tokens.
    (tokens,) = (tmp_path / "own").glob("tokens-*-train/*.tokens.npy")
    content = tokens.read_bytes()
    tokens.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    mended = pool.run(prepare, config, [tmp_path / "shared", tmp_path / "own"])
    assert [rank.files for rank in mended] == [0, 0, 0, 0, FILES, 0, 0, 0]
    assert tokens.read_bytes() == content
    for rank in (*first, *warm, *apart, *mended):
        assert (rank.error, rank.summary, rank.rows) == ("", first[0].summary, first[0].rows)
    # Other files on another node would train it on other data, in silence.
    other = text_config(tmp_path / "other", FILES - 1)
    told = pool.run(prepare, config, [tmp_path / "shared", tmp_path / "third"], other)
    assert len({rank.error for rank in told}) == 1
    assert "rank 0's has" in told[0].error
    # What one rank finds ends all of them, and none waits.
    (tmp_path / "empty").mkdir()
    empty = configured(["data=text", f"data.path={tmp_path}/empty"], 2)
    assert {rank.error.partition(":")[0] for rank in pool.run(prepare, empty, shared)} == {
        f"data.path={tmp_path}/empty holds no file to read"
    }


@pytest.mark.parametrize("bad", [None, 90])
def test_each_rank_checks_its_share_of_given_ids(pool: Pool, tmp_path: Path, bad: int | None) -> None:
    table = np.full((101, 17), 7, np.int32)
    if bad is not None:
        table[bad, 3] = 96
    np.save(tmp_path / "ids.npy", table)
    config = configured(["data=tokens", f"data.path={tmp_path}/ids.npy"], 2)
    ranks = pool.run(prepare, config, [tmp_path] * 2)
    if bad is not None:
        assert len({rank.error for rank in ranks}) == 1
        assert f"row {bad} holds the id 96" in ranks[0].error
        return
    assert sum(rank.checked for rank in ranks) == table.nbytes
    assert max(rank.checked for rank in ranks) == 13 * 17 * 4
    assert all((rank.summary, rank.rows) == (ranks[0].summary, ranks[0].rows) for rank in ranks)
