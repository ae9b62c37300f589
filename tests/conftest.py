from collections.abc import Generator, Iterator

import pytest

from tests.parallel.pool import Pool


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Generator[None, object, object]:
    """All that uses the pool runs in one process, which has one pool."""
    pooled = [item for item in items if "pool" in getattr(item, "fixturenames", ())]
    for item in pooled:
        item.add_marker(pytest.mark.xdist_group("pool"))
    result = yield
    # pytest 9.2 no longer lets xdist 3.8 name the group, and then there are two pools on two cores.
    if getattr(config.option, "loadgroup", False) and not all(
        item.nodeid.endswith("@pool") for item in pooled
    ):
        raise pytest.UsageError("pytest-xdist does not group tests with this pytest: see constraints.txt")
    return result


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    workers = Pool(8)
    yield workers
    workers.close()
