from collections.abc import Iterator

import pytest

from tests.distributed.pool import Pool


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All that uses the pool runs in one process, which has one pool."""
    for item in items:
        if "pool" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("pool"))


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    workers = Pool(8)
    yield workers
    workers.close()
