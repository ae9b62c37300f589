import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from dsv3.checkpoint import manifest
from dsv3.checkpoint.directory import Progress
from dsv3.checkpoint.manifest import read_manifest, verify, verify_description, write_manifest
from dsv3.errors import UserError
from dsv3.tokens import file_digests
from dsv3.tokens.file_digests import FileEntry, digest

CONTENTS = {"a.distcp": b"one" * 100, "b.distcp": b"two" * 100, "tokenizer/tokenizer.json": b"{}"}


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """Write a directory with two files of the same size and one in a folder, and their manifest."""
    for name, content in CONTENTS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    write_manifest(tmp_path, {name: FileEntry.of(tmp_path / name) for name in CONTENTS})
    return tmp_path


def test_a_digest_is_the_xxh3_128_of_the_content_however_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytes(range(256)) * 41
    (tmp_path / "file").write_bytes(content)
    monkeypatch.setattr(file_digests, "_BUFFER_BYTES", 1000)
    told: list[int] = []
    assert digest(tmp_path / "file", told.append) == xxhash.xxh3_128_hexdigest(content)
    assert sum(told) == len(content)
    assert len(told) == 11


def test_an_empty_file_has_a_digest(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert digest(tmp_path / "file") == xxhash.xxh3_128_hexdigest(b"")


def test_what_is_written_is_read(sealed: Path) -> None:
    entries = read_manifest(sealed)
    assert entries == {name: FileEntry.of(sealed / name) for name in CONTENTS}


def test_sound_files_pass(sealed: Path) -> None:
    assert verify(sealed)
    assert verify_description(sealed)


def test_without_a_manifest_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    assert not verify(tmp_path)
    assert not verify_description(tmp_path)


def _truncate(directory: Path) -> None:
    (directory / "b.distcp").write_bytes(CONTENTS["b.distcp"][:-1])


def _extend(directory: Path) -> None:
    (directory / "b.distcp").write_bytes(CONTENTS["b.distcp"] + b"x")


def _flip(directory: Path) -> None:
    content = bytearray(CONTENTS["b.distcp"])
    content[150] ^= 4
    (directory / "b.distcp").write_bytes(content)


def _unlink(directory: Path) -> None:
    (directory / "b.distcp").unlink()


def _folder(directory: Path) -> None:
    (directory / "b.distcp").unlink()
    (directory / "b.distcp").mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (_truncate, "is truncated: it has 299 bytes, manifest.json says 300"),
    "extended": (_extend, "is altered: it has 301 bytes, manifest.json says 300"),
    "flipped": (_flip, r"is altered: its XXH3-128 is [0-9a-f]{32}, manifest.json says [0-9a-f]{32}"),
    "missing": (_unlink, "is missing: manifest.json lists it with 300 bytes"),
    "a folder": (_folder, "is missing"),
}


@pytest.mark.parametrize(("damage", "told"), DAMAGES.values(), ids=DAMAGES.keys())
def test_each_kind_of_damage_is_named(sealed: Path, damage: Callable[[Path], None], told: str) -> None:
    damage(sealed)
    with pytest.raises(UserError, match=f"{sealed}/b.distcp {told}"):
        verify(sealed)
    assert verify(sealed, ["a.distcp"])


def test_files_that_have_changed_places_are_named(sealed: Path) -> None:
    shutil.move(sealed / "a.distcp", sealed / "c")
    shutil.move(sealed / "b.distcp", sealed / "a.distcp")
    shutil.move(sealed / "c", sealed / "b.distcp")
    with pytest.raises(UserError, match=f"{sealed}/a.distcp is altered"):
        verify(sealed)


def test_sizes_come_before_any_content(sealed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _flip(sealed)
    (sealed / "tokenizer/tokenizer.json").unlink()
    monkeypatch.setattr(manifest, "digest", lambda *_: pytest.fail("read"))
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        verify(sealed)


def test_the_content_of_tensors_is_left_to_the_workers(sealed: Path) -> None:
    _flip(sealed)
    assert verify_description(sealed)
    (sealed / "tokenizer/tokenizer.json").write_text("{{")
    with pytest.raises(UserError, match=r"tokenizer\.json is altered"):
        verify_description(sealed)


def test_a_missing_manifest_is_told_where_there_was_one(tmp_path: Path) -> None:
    Progress(step=3).write(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}/manifest.json is missing: state.json says"):
        verify(tmp_path)
    (tmp_path / "state.json").write_text('{"step": 3, "samples": 0, "tokens": 0}')  # of an older version
    assert not verify(tmp_path)


def test_any_changed_digit_of_a_manifest_is_its_own_damage(sealed: Path) -> None:
    path = sealed / "manifest.json"
    text = path.read_text()
    for place in [index for index, letter in enumerate(text) if letter.isdigit()]:
        digit = "1" if text[place] != "1" else "2"
        path.write_text(text[:place] + digit + text[place + 1 :])
        with pytest.raises(UserError, match=f"{path} cannot be read, it may be damaged"):
            verify(sealed)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"files": {}}', "\0", "[" * 100_000],
    ids=["empty", "torn", "a list", "no files", "no digest", "zero", "endless nesting"],
)
def test_a_broken_manifest_is_told_with_its_path(sealed: Path, text: str) -> None:
    (sealed / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=f"{sealed}/manifest.json cannot be read") as caught:
        verify(sealed)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", ""])
def test_a_manifest_cannot_point_outside(sealed: Path, name: str) -> None:
    write_manifest(sealed, {name: FileEntry(1, "0" * 32)})
    with pytest.raises(UserError, match="points outside the directory"):
        verify(sealed)


def test_a_killed_write_leaves_no_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_manifest(tmp_path, {})
    assert read_manifest(tmp_path) is None
