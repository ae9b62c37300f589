"""DeepEP is refused before the launch where it cannot run: device, dtype, sizes, nodes, package."""

import importlib.util

import pytest

from dsv3.config.parallel import SavedOp
from dsv3.errors import UserError
from dsv3.launch.job import Job, plan_job
from dsv3.planning.checks import DEEPEP_SIZES
from tests.harness.composing import strict_config

DEEPEP = "parallel.expert.backend=deepep"
CHOSEN = ["parallel=tp_ep", "hardware=h800", "precision=bf16", DEEPEP]


def planned(*overrides: str) -> Job:
    return plan_job(strict_config(["task=plan", *CHOSEN, *overrides]), [])


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as refused:
        planned(*overrides)
    assert len(str(refused.value).splitlines()) <= 2
    return str(refused.value)


def test_it_needs_gpus_and_bf16() -> None:
    assert refusal("hardware=cpu") == (
        "parallel.expert.backend=deepep needs CUDA GPUs, and hardware.name=cpu here: "
        "take parallel.expert.backend=all_to_all"
    )
    assert refusal("precision=fp32") == (
        "parallel.expert.backend=deepep carries bf16 rows, and precision.compute=fp32 here: "
        "take precision=bf16, or take parallel.expert.backend=all_to_all"
    )


def test_fp8_rows_are_whole_tiles() -> None:
    in_fp8 = ("precision=fp8", "precision.fp8.dispatch=true")
    assert refusal(*in_fp8, "model.dim=320") == (
        "parallel.expert.backend=deepep carries FP8 rows in whole tiles of 128, and model.dim=320 here: "
        "nearest that work: 256, 384; or take precision.fp8.dispatch=false, or "
        "take parallel.expert.backend=all_to_all"
    )
    assert "model.dim=64 here: nearest that work: 128; or" in refusal(*in_fp8, "model.dim=64")
    planned(*in_fp8, "model.dim=256")


def test_one_rank_has_nothing_to_exchange() -> None:
    planned("parallel.degrees.ep=1", "hardware=cpu", "precision=fp32")


def test_all_to_all_is_the_default() -> None:
    expert = strict_config(["parallel=tp_ep"]).parallel.expert
    assert expert is not None
    assert expert.backend.value == "all_to_all"


def test_groups_have_the_sizes_that_deepep_is_tuned_for() -> None:
    large = ("model=671b", "parallel.degrees.tp=1", "launch.world_size=2048")
    assert refusal(*large, "parallel.degrees.ep=256") == (
        "parallel.degrees.ep=256 is no size that parallel.expert.backend=deepep has; "
        "nearest that work: 128; or take parallel.expert.backend=all_to_all"
    )
    for ep in (8, 32, 128):
        assert ep in DEEPEP_SIZES
        assert planned(*large, f"parallel.degrees.ep={ep}").plan.degrees.ep == ep


def test_an_exchange_is_within_a_node_or_takes_nodes_of_8() -> None:
    large = ("model=671b", "parallel.degrees.tp=1", "launch.world_size=64")
    assert refusal(*large, "parallel.degrees.ep=16", "hardware.devices_per_node=4") == (
        "parallel.expert.backend=deepep with parallel.degrees.ep=16 needs nodes of 8 ranks, and a node has "
        "4 here: take parallel.expert.backend=all_to_all"
    )
    assert "needs nodes of a multiple of 8 ranks" in refusal(
        *large, "parallel.degrees.ep=8", "hardware.devices_per_node=4"
    )
    planned(*large, "parallel.degrees.ep=4", "hardware.devices_per_node=4")


def test_a_job_that_starts_here_needs_the_package_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(*overrides: str) -> Job:
        return plan_job(strict_config([*CHOSEN, *overrides]), [])

    monkeypatch.setattr("dsv3.launch.job.visible_gpus", list)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"needs the package deep_ep \(1\.2\.1, .*\n.*backend=all_to_all"):
        trained()
    planned()
    trained("launch=slurm")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    trained()


def test_a_plan_counts_the_exchange_that_recomputation_repeats() -> None:
    assert SavedOp.exchange not in planned("recompute=selective").plan.shape.keep
    plain = planned("recompute=selective", "parallel.expert.backend=all_to_all").plan
    assert SavedOp.exchange in plain.shape.keep
    assert plain.traffic.ep < planned("recompute=selective").plan.traffic.ep
