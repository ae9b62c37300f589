"""benchmarks/mutations.py finds the texts that it replaces: one that changes nothing proves nothing."""

import pytest

from benchmarks.mutations import MUTATIONS, ROOT, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.rule)
def test_a_mutation_finds_its_text(mutation: Mutation) -> None:
    assert mutation.old in (ROOT / mutation.file).read_text()
    assert all((ROOT / folder).exists() for folder in mutation.tests.split())
