"""docs/models.md says which public checkpoints are read, with how many parameters, and why others are not."""

import pytest

from tests.docs.public_configs import CHECKPOINTS, DOCUMENT, FOLDER, document, rows_of_files, table


def test_the_table_is_what_reading_the_facts_comes_to() -> None:
    text = DOCUMENT.read_text()
    assert document(text) == text, "run: python -m tests.docs.public_configs"


def test_parameters_are_those_that_the_publisher_names() -> None:
    rows = dict(zip((each.name for each in CHECKPOINTS), table().splitlines()[2:], strict=True))
    for checkpoint in CHECKPOINTS:
        if checkpoint.published:
            count = int(rows[checkpoint.name].split("|")[3].replace(",", ""))
            unit = {"B": 1e9, "T": 1e12}[checkpoint.published[-1]]
            assert f"{count / unit:.0f}{checkpoint.published[-1]}" == checkpoint.published


@pytest.mark.skipif(not FOLDER.is_dir(), reason="the files belong to others and are not part of the project")
def test_the_files_themselves_give_the_same_rows() -> None:
    made = table().splitlines()
    assert not [name for name, row in rows_of_files(FOLDER) if row not in made]
    folders = {
        path.name for path in FOLDER.iterdir() if path.is_dir() and not path.name.endswith("-hf_quant")
    }
    assert folders == {checkpoint.folder for checkpoint in CHECKPOINTS}
