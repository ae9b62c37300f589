"""The rooms stand in docs/architecture.md in the order that the linter holds."""

from tests.docs.rooms_table import DOCUMENT, ROOT, document, layers


def test_the_table_of_rooms_is_the_contract() -> None:
    text = DOCUMENT.read_text()
    assert document(text) == text, "run: python -m tests.docs.rooms_table"


def test_every_room_has_its_place() -> None:
    found = {path.stem for path in (ROOT / "dsv3").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert found - {"__init__", "__pycache__", "conf", "py"} == set(layers())


def test_no_file_name_occurs_in_two_rooms() -> None:
    # config mirrors the groups of conf/ and tasks the choices of one of them, so their names are given.
    names: dict[str, list[str]] = {}
    for path in (ROOT / "dsv3").glob("*/*.py"):
        if path.parent.name not in ("config", "tasks") and path.name != "__init__.py":
            names.setdefault(path.name, []).append(str(path))
    assert not [paths for paths in names.values() if len(paths) > 1]


def test_no_file_is_too_small_to_be_a_concept() -> None:
    # A group of conf/ and a choice of `task` have a file of their own, whatever its size.
    paths = [path for path in (ROOT / "dsv3").glob("*/*.py") if path.parent.name not in ("config", "tasks")]
    lines = {path: len(path.read_text().splitlines()) for path in paths if path.name != "__init__.py"}
    assert not [path for path, count in lines.items() if count < 40]
