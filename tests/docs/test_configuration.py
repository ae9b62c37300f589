"""docs/configuration.md says what the schemas say, and the schemas describe every key."""

import pytest

from dsv3.config.keys import schema_keys
from dsv3.config.registry import SCHEMAS
from tests.docs.configuration_table import DOCUMENT, document


def test_every_key_with_its_type_default_and_description_stands_in_the_documentation() -> None:
    text = DOCUMENT.read_text()
    assert document(text) == text, "run: python -m tests.docs.configuration_table"


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_field_of_every_schema_has_one_line_of_description(name: str) -> None:
    keys = list(schema_keys(SCHEMAS[name], name))
    bad = [key.name for key in keys if not key.description.endswith((".", ")")) or "\n" in key.description]
    assert not bad, "write one line under each of these fields of dsv3/config/"
