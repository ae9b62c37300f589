"""The files of a corpus, their order, and the fingerprint."""

from pathlib import Path

import pytest

from dsv3.data.corpus import StdlibCorpus, TextCorpus
from dsv3.errors import UserError


def names(corpus: TextCorpus | StdlibCorpus) -> list[str]:
    return [document.name for document in corpus.documents()]


def test_text_is_found_at_every_depth_in_a_stable_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a.b/x.py", "a/y.unheard_of", ".git/config", "c/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert names(TextCorpus(str(tmp_path))) == ["a.b/x.py", "a/y.unheard_of", "a/z.md", "b.txt"]


def test_binary_files_are_counted_and_empty_ones_left_out(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    (tmp_path / "zeros.txt").write_bytes(b"text\0with a zero")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "windows.txt").write_bytes("naïve\r\n".encode())
    corpus = TextCorpus(str(tmp_path))
    assert [document.text for document in corpus.documents()] == ["naïve\r\n"]
    assert corpus.skipped == 2


def test_a_single_file_is_a_corpus(tmp_path: Path) -> None:
    file = tmp_path / "book, it's (1).txt"
    file.write_text("once")
    assert names(TextCorpus(str(file))) == ["book, it's (1).txt"]


def test_the_fingerprint_sees_names_and_contents_but_not_the_place(tmp_path: Path) -> None:
    prints = []
    for place, name, text in [
        ("one", "a.txt", "text"),
        ("two", "a.txt", "text"),
        ("three", "b.txt", "text"),
        ("four", "a.txt", "texts"),
    ]:
        (tmp_path / place).mkdir()
        (tmp_path / place / name).write_text(text)
        prints.append(TextCorpus(str(tmp_path / place)).fingerprint())
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
    assert all(len(p) == 16 and int(p, 16) >= 0 for p in prints)


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00"])
def test_nothing_to_read_is_the_users_mistake(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match=r"data\.path="):
        TextCorpus(str(tmp_path)).infos()
    with pytest.raises(UserError, match=r"data\.path=.*nowhere"):
        TextCorpus(str(tmp_path / "nowhere"))


def test_tests_and_installed_packages_are_no_part_of_the_library(tmp_path: Path) -> None:
    wanted = ["json/decoder.py", "pydoc_data/topics.py", "re.py", "test.py"]
    others = ["test/re.py", "lib2to3/tests/a.py", "idlelib/idle_test/b.py", "site-packages/torch/c.py"]
    others += ["dist-packages/d.py", "json/__pycache__/e.py", "LICENSE.txt"]
    for name in wanted + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("pass")
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*- \xe9")
    assert names(StdlibCorpus(tmp_path)) == wanted


def test_a_python_without_its_sources_points_to_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data=text"):
        StdlibCorpus(tmp_path).infos()


def test_the_library_of_this_interpreter_is_some_megabytes() -> None:
    infos = StdlibCorpus().infos()
    assert 5e6 < sum(info.size for info in infos) < 30e6
    assert {"json/decoder.py", "pydoc_data/topics.py"} <= {info.name for info in infos}
    assert not [info.name for info in infos if info.name.startswith("test/")]
