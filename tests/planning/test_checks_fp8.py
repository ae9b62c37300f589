"""precision.fp8 is refused before the launch where no engine runs it or settings exclude each other."""

import pytest

from dsv3.errors import UserError
from dsv3.launch.job import plan_job
from tests.harness.composing import strict_config


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as refused:
        plan_job(strict_config(["task=plan", "precision=fp8", *overrides]), [])
    assert len(str(refused.value).splitlines()) <= 2
    return str(refused.value)


@pytest.mark.parametrize("hardware", ["a100", "b200", "cpu"])
def test_only_hopper_multiplies_blocks(hardware: str) -> None:
    assert refusal(f"hardware={hardware}", "precision.fp8.engine=scaled_mm") == (
        f"precision.fp8.engine=scaled_mm needs a Hopper GPU (h100, h200, h800), and hardware.name={hardware} "
        "here: take precision=bf16, or precision.fp8.engine=emulated, which computes the same and is slow"
    )


@pytest.mark.parametrize(
    ("hardware", "said"),
    [
        ("a100", True),
        ("b200", True),
        ("gb200", True),
        ("{name:NVIDIA RTX 6000}", True),
        ("{name:NVIDIA H100 PCIe}", False),
        ("h200", False),
        ("cpu", False),
    ],
)
def test_a_gpu_without_block_scales_is_told_that_it_emulates_fp8(hardware: str, said: bool) -> None:
    node = [f"hardware={hardware}"] if "{" not in hardware else [f"hardware.name='{hardware[6:-1]}'"]
    notes = plan_job(strict_config(["task=plan", "precision=fp8", *node]), []).notes
    assert [note for note in notes if "FP8 is emulated in fp32 on" in note] == (notes if said else [])
    assert len(notes) == said


@pytest.mark.parametrize(
    "overrides",
    [
        ["hardware=cpu"],
        ["hardware=h800"],
        ["hardware=h100", "precision.fp8.engine=scaled_mm"],
        ["hardware=b200", "precision.fp8.engine=emulated"],
        ["hardware=b200", "precision.fp8.granularity=tensor"],
        ["hardware=cpu", "precision.fp8.granularity=tensor"],
        ["hardware=h800", "precision.fp8.gather=true", "precision.fp8.dispatch=true"],
    ],
)
def test_what_can_run_is_planned(overrides: list[str]) -> None:
    plan_job(strict_config(["task=plan", "precision=fp8", *overrides]), [])


@pytest.mark.parametrize("name", ["dispatch", "gather"])
def test_one_scale_a_tensor_goes_with_nothing_that_has_tiles(name: str) -> None:
    by_tensor = "precision.fp8.granularity=tensor"
    assert refusal("hardware=cpu", by_tensor, f"precision.fp8.{name}=true") == (
        f"precision.fp8.{name}=true quantises in tiles, and {by_tensor} here: take one of the two"
    )
    assert refusal("hardware=h100", by_tensor).startswith(f"{by_tensor} is emulated only")


def test_shards_on_the_host_are_not_quantised() -> None:
    chosen = ["hardware=h800", "parallel=fsdp", "parallel.fsdp.cpu_offload=true"]
    assert "parallel.fsdp.cpu_offload=true keeps them on the host" in refusal(
        *chosen, "precision.fp8.gather=true"
    )
