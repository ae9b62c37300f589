from tests.docs.configuration_table import DOCUMENT, document


def test_every_key_with_its_type_and_default_stands_in_the_documentation() -> None:
    text = DOCUMENT.read_text()
    assert document(text) == text, "run: python -m tests.docs.configuration_table"
