"""Training steps on a simulated GPU: they run, learn what the CPU learns, and let the host wait nowhere else.

cases.py has the configurations. A case runs where no tensor is on a wrong device and no CUDA kernel would
refuse its operands; tests/cuda/device.py says what is simulated.
"""

from typing import Any

import pytest

from tests.cuda.cases import CASES, EXACT, HOST_WAITS
from tests.cuda.conftest import Results

pytestmark = pytest.mark.xdist_group("cuda")

ADVICE = """
A step of the case {name!r} makes the host wait for the GPU where it did not: {new}
While the host waits the GPU runs out of work, once per microbatch or layer. Keep the value on the device:
scatter_add or cumsum in place of bincount, nonzero and boolean masks; model/transfers.py upload() in place of
torch.tensor(.., device=) and .to(device); metrics are read every log_every steps. If the wait is unavoidable,
add it to tests/cuda/host_waits.json and, with the reason, to the table of docs/gpu.md."""


@pytest.mark.parametrize("simulation", CASES)
def test_a_step_learns_what_it_learns_on_the_cpu(simulated: Results, simulation: str) -> None:
    case, found = CASES[simulation], result(simulated, simulation)
    expected = found["expected"] if case.reference is None else result(simulated, case.reference)["found"]
    norm = case.tolerance if case.tolerance == EXACT else 0.1
    assert found["found"][0::2] == pytest.approx(expected[0::2], rel=case.tolerance)
    assert found["found"][1::2] == pytest.approx(expected[1::2], rel=norm)


@pytest.mark.parametrize("simulation", CASES)
def test_the_host_waits_where_the_table_says(simulated: Results, simulation: str) -> None:
    found, known = result(simulated, simulation)["waits"], HOST_WAITS[simulation]
    new = {place: count for place, count in found.items() if count > known.get(place, 0)}
    assert not new, ADVICE.format(name=simulation, new=new)
    assert found == known, "a wait has gone: take it out of tests/cuda/host_waits.json and docs/gpu.md"


@pytest.mark.parametrize("simulation", CASES)
def test_pytorch_chooses_the_attention_kernel_that_is_meant(simulated: Results, simulation: str) -> None:
    assert tuple(sorted(result(simulated, simulation)["kernels"])) == CASES[simulation].kernels


@pytest.mark.parametrize("simulation", ["fp8"])
def test_scaled_mm_gets_the_operands_of_the_emulation(simulated: Results, simulation: str) -> None:
    # Before the first update they differ by the order of sums alone: cuBLAS's layouts and paddings are right.
    scaled, emulated = (result(simulated, name)["found"] for name in (simulation, "fp8, emulated"))
    assert scaled[:2] == pytest.approx(emulated[:2], rel=1e-3)


@pytest.mark.parametrize("simulation", ["train_py_trains_evaluates_samples_saves_and_resumes"])
def test_program(simulated: Results, simulation: str) -> None:
    result(simulated, simulation)


def result(simulated: Results, name: str) -> dict[str, Any]:
    """Return the result of a case that must have run."""
    found = simulated[name]
    assert "error" not in found, found["error"]
    return found
