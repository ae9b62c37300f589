"""A fixture for packages whose tests compute with one thread: their conftest.py imports it.

On numbers this small a second thread costs more than it brings, it would wait for the other at every
operation, and how a processor treats subnormals is set for a thread alone.
"""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """As many threads as before once the package is done."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
