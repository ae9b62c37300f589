"""The simulated GPU itself: it refuses what CUDA refuses and notes what makes a host wait
(self_checks.py)."""

import pytest

from tests.cuda.conftest import Results

pytestmark = pytest.mark.xdist_group("cuda")

CHECKS = [
    "tensors_of_two_devices_are_refused",
    "reading_a_value_is_a_wait",
    "an_upload_is_a_wait_unless_it_comes_from_pinned_memory_and_need_not_block",
    "uploads_and_downloads_of_the_model_wait_no_longer_than_they_must",
    "grouped_matmuls_refuse_operands_that_are_not_aligned",
    "operators_without_a_deterministic_kernel_are_refused_on_demand",
    "every_attention_backend_has_the_numbers_and_gradients_of_the_cpu",
    "memory_counts_what_is_held_in_blocks",
]


@pytest.mark.parametrize("simulation", CHECKS)
def test_simulator(simulated: Results, simulation: str) -> None:
    found = simulated[simulation]
    assert "error" not in found, found["error"]
