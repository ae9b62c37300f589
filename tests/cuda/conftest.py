"""The results of all simulated cases, which one process computes once per session (run_cases.py)."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.cuda.cases import CASES
from tests.cuda.library import build_library, obstacle
from tests.harness.processes import ROOT, environment

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def simulated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results by name of every case and check that a collected test is about."""
    reason = obstacle()
    if reason:
        pytest.skip(reason)
    build_library()
    asked = [getattr(item, "callspec", None) for item in request.session.items]
    names = {one.params["simulation"] for one in asked if one and "simulation" in one.params}
    names |= {CASES[name].reference or name for name in names if name in CASES}
    names |= {"fp8, emulated"} if "fp8" in names else set()
    target = tmp_path_factory.mktemp("simulated") / "results.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.cuda.run_cases", str(target), *sorted(names)],
        capture_output=True,
        text=True,
        env=environment(OMP_NUM_THREADS="1", DSV3_PROGRESS="off"),
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results: Results = json.loads(target.read_text())
    return results
