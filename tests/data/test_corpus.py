"""The files of a corpus, their order, and the stamp by which a change of them is seen without reading."""

import os
import time
from pathlib import Path

import pytest

from dsv3.data import corpus as corpus_module
from dsv3.data.corpus import Corpus, StdlibCorpus, TextCorpus
from dsv3.errors import UserError
from dsv3.metrics.progress import Phase


def names(corpus: Corpus) -> list[str]:
    return [file.name for file in corpus.files().files]


def write(folder: Path, *names: str, text: str = "text") -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_text_is_found_at_every_depth_in_a_stable_order(tmp_path: Path) -> None:
    write(tmp_path, "b.txt", "a/z.md", "a.b/x.py", "a/y.unheard_of", ".git/config", "c/.hidden", "a/b.txt~")
    assert names(TextCorpus(str(tmp_path))) == ["a.b/x.py", "a/y.unheard_of", "a/z.md", "b.txt"]
    assert names(TextCorpus(f"{tmp_path}/")) == names(TextCorpus(str(tmp_path)))
    assert TextCorpus(str(tmp_path)).files().left_out == [
        str(tmp_path / name) for name in (".git", "a/b.txt~", "c/.hidden")
    ]


def test_links_to_nowhere_in_a_folder_cannot_be_read_and_pipes_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, "files/a.txt", "files/b.txt", "c/d.txt")
    folder = tmp_path / "files"
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere")
    (folder / "loop.txt").symlink_to("loop.txt")
    (folder / "c").symlink_to(tmp_path / "c")
    os.mkfifo(folder / "pipe")
    corpus = TextCorpus(str(folder))
    found = corpus.files()
    assert [file.name for file in found.files] == ["a.txt", "b.txt", "c/d.txt"]
    assert found.unreadable == [
        f"{folder / name} (a link that leads nowhere)" for name in ("gone.txt", "loop.txt")
    ]
    assert found.left_out == [f"{folder / 'pipe'} (no file)"]
    assert TextCorpus(f"{folder}/**/*.txt").files().unreadable == found.unreadable
    before = corpus.stamp()
    (folder / "gone.txt").unlink()
    assert corpus.stamp() != before
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "x").symlink_to("y")
    with pytest.raises(UserError, match=r"holds no file to read \(1 unreadable, first .*/x "):
        TextCorpus(str(tmp_path / "links")).files()


def test_a_single_file_or_a_pattern_is_a_corpus(tmp_path: Path) -> None:
    write(tmp_path, "book, it's (1).txt", "a/b.md", "a/c/d.md")
    assert names(TextCorpus(str(tmp_path / "book, it's (1).txt"))) == ["book, it's (1).txt"]
    assert names(TextCorpus(f"{tmp_path}/**/*.md")) == ["b.md", "c/d.md"]
    with pytest.raises(UserError, match=r"data\.path=.*nowhere"):
        TextCorpus(str(tmp_path / "nowhere")).files()
    with pytest.raises(UserError, match=r"data\.path=\[A,B\] matches no file; one path .*data=mixture"):
        TextCorpus("[A,B]").files()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"data\.path=.*empty holds no file"):
        TextCorpus(str(tmp_path / "empty")).files()


def age(folder: Path) -> None:
    """Let every file have been written at times of the past that differ in less than a microsecond."""
    for number, path in enumerate(sorted(folder.rglob("*"))):
        os.utime(path, ns=(10**18 + number, 10**18 + number))


@pytest.mark.parametrize("path", ["", "*.txt"])
def test_the_stamp_sees_names_sizes_and_times(tmp_path: Path, path: str) -> None:
    folder = write(tmp_path / "corpus", "a.txt", "b.txt")
    age(folder)
    corpus = TextCorpus(f"{folder}/{path}".rstrip("/"))
    stamps = [corpus.stamp()]
    os.utime(folder / "a.txt", ns=(0, 10**18 + 500))
    stamps.append(corpus.stamp())
    write(folder, "a.txt", text="texts")
    os.utime(folder / "a.txt", ns=(0, 10**18 + 500))
    stamps.append(corpus.stamp())
    (folder / "b.txt").rename(folder / "c.txt")
    stamps.append(corpus.stamp())
    write(folder, "d.txt")
    stamps.append(corpus.stamp())
    assert len({stamp.digest for stamp in stamps}) == len(stamps)
    assert [stamp.files for stamp in stamps] == [2, 2, 2, 2, 3]
    write(folder, "d.txt~", ".d.txt.swp")  # an editor at work changes nothing
    assert corpus.stamp() == stamps[-1]


def test_a_stamp_waits_until_the_next_change_has_another_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path, "a.txt") / "a.txt"
    now = 1_700_000_000_000_000_123
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        nonlocal now
        waits.append(seconds)
        now += round(seconds * 1e9)

    monkeypatch.setattr(time, "time_ns", lambda: now)
    monkeypatch.setattr(time, "sleep", sleep)
    for before, wait in [(10**9, 0.0), (0, 0.02), (-(10**12), 0.0)]:
        os.utime(file, ns=(0, now - before))
        TextCorpus(str(tmp_path)).settled_stamp()
        assert sum(waits) == pytest.approx(wait)
        waits.clear()
    second = now // 10**9 * 10**9
    os.utime(file, ns=(0, second))  # a file system without fractions of a second
    TextCorpus(str(tmp_path)).settled_stamp()
    assert sum(waits) > 1.0
    assert now == pytest.approx(second + 2 * 10**9, abs=1000)


def test_units_of_files_that_have_changed_are_refused(tmp_path: Path) -> None:
    corpus = TextCorpus(str(write(tmp_path, "a.txt")))
    age(tmp_path)
    stamp = corpus.stamp()
    assert [part.file.name for unit in corpus.units(stamp) for part in unit.parts] == ["a.txt"]
    write(tmp_path, "b.txt")
    with pytest.raises(UserError, match="files have changed since they were looked at"):
        corpus.units(stamp)


def test_what_cannot_be_listed_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a.txt", "locked/b.txt")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if path.endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = TextCorpus(str(tmp_path)).files()
    assert found.unreadable == [f"{tmp_path}/locked (Permission denied)"]
    before = TextCorpus(str(tmp_path)).stamp()
    monkeypatch.undo()
    assert TextCorpus(str(tmp_path)).stamp() != before


def test_looking_at_files_is_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, *(f"{number}.txt" for number in range(7)))
    monkeypatch.setattr(corpus_module, "_TOLD", 3)
    counts: list[int] = []
    monkeypatch.setattr(Phase, "advance", lambda phase, count=1: counts.append(count))
    TextCorpus(str(tmp_path)).stamp()
    assert counts == [3, 3, 1]


def test_tests_and_installed_packages_are_no_part_of_the_library(tmp_path: Path) -> None:
    wanted = ["json/decoder.py", "latin.py", "pydoc_data/topics.py", "re.py", "test.py"]
    others = ["test/re.py", "lib2to3/tests/a.py", "idlelib/idle_test/b.py", "site-packages/torch/c.py"]
    others += ["dist-packages/d.py", "json/__pycache__/e.py", "LICENSE.txt"]
    write(tmp_path, *wanted, *others)
    (tmp_path / "linked").symlink_to(tmp_path / "json")
    assert names(StdlibCorpus(tmp_path)) == wanted


def test_a_python_without_its_sources_points_to_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data=text"):
        StdlibCorpus(tmp_path).files()


def test_the_library_of_this_interpreter_is_some_megabytes() -> None:
    files = StdlibCorpus().files().files
    assert 5e6 < sum(file.size for file in files) < 30e6
    assert {"json/decoder.py", "pydoc_data/topics.py"} <= {file.name for file in files}
    assert not [file.name for file in files if file.name.startswith("test/")]


def test_a_saved_dataset_is_no_folder_of_text(tmp_path: Path) -> None:
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=r"read it by data=hf data\.dataset="):
        corpus_module.TextCorpus(str(tmp_path)).files()
