"""Live export: every layout writes the same files, each rank its share, and all ranks fail together."""

from collections import Counter
from math import ceil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv3.checkpoint.manifest import read_manifest, verify
from dsv3.config.convert import StoredType
from dsv3.convert.shard_exchange import AHEAD
from dsv3.planning.layout import ParallelDims
from tests.convert.releases import read_release, write_release
from tests.harness.pool import Pool
from tests.parallel.tiny_training import configured
from tests.parallel.worker_live_export import SLICE, Traffic, export, fail

LAYOUTS = {
    "hsdp x tp, ep": ParallelDims(dp_replicate=2, dp_shard=2, tp=2, ep=4),
    "pp x cp x tp": ParallelDims(pp=2, cp=2, tp=2),
    "dp_shard": ParallelDims(dp_shard=8),
}

BLOCK = (16, 8)

TRAVELLING = (StoredType.bf16, StoredType.fp8)
"""Types whose rows travel in different dtypes: bf16, and fp32 as for a file in fp32."""

WIDEST_ROW = 4 * 96
"""Bytes of the longest row of the tiny model."""

Single = tuple[Path, list[tuple[str, Tensor]]]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Single:
    """Return a run directory with assets, in which one process has exported, and what it streamed."""
    run_dir = tmp_path_factory.mktemp("run")
    write_release(run_dir / "assets", configured([], 2).model, "fp8", block=BLOCK)
    for file in (run_dir / "assets").glob("*.safetensors*"):
        file.unlink()
    done = export(configured([], 2), None, run_dir, run_dir, StoredType)
    return run_dir, done[1]


def test_one_process_exports_what_a_release_holds(tmp_path: Path) -> None:
    released = write_release(tmp_path / "given", configured([], 2).model, "fp32")
    config = configured([f"checkpoint.load=hf:{tmp_path}/given"], 2)
    done = export(config, None, tmp_path / "no run", tmp_path, [StoredType.fp32])
    exported = read_release(tmp_path / "fp32")
    assert exported.keys() == released.keys()
    for found in (exported, dict(done[1])):
        for name in released:
            if name.endswith("e_score_correction_bias"):  # the tests' model begins with biases of its own
                assert found[name].dtype is torch.float32
            else:
                assert torch.equal(found[name], released[name]), name


def test_types_are_roundings_of_the_same_weights(single: Single) -> None:
    """fp8 against the same weights written by `write_release`, whose quantizer is the reference."""
    run_dir, streamed = single
    exported = {stored: read_release(run_dir / stored.name) for stored in StoredType}
    for name, value in streamed:
        assert torch.equal(exported[StoredType.fp32][name], value), name
        is_bias = name.endswith("e_score_correction_bias")
        assert torch.equal(exported[StoredType.bf16][name], value if is_bias else value.bfloat16()), name
    wanted = write_release(
        run_dir / "fp8 whole", configured([], 2).model, "fp8", 1, BLOCK, weights=dict(streamed)
    )
    found = exported[StoredType.fp8]
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_writes_the_files_of_one_process(
    pool: Pool, tmp_path: Path, single: Single, layout: str
) -> None:
    run_dir, streamed = single
    degrees = LAYOUTS[layout]
    ranks = pool.run(export, configured(["parallel=fsdp"], 1), degrees, run_dir, tmp_path, TRAVELLING)
    for stored in TRAVELLING:
        assert verify(tmp_path / stored.name)
        assert read_manifest(tmp_path / stored.name) == read_manifest(run_dir / stored.name)
        _check_shares([done[stored] for done, _ in ranks], tmp_path / stored.name)
    for _, mine in ranks:
        assert [name for name, _ in mine] == [name for name, _ in streamed]
        for (name, one), (_, other) in zip(mine, streamed, strict=True):
            assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)), name


def _check_shares(ranks: list[Traffic], folder: Path) -> None:
    """Check that every file has one writer, ranks have equal shares, and no byte travels twice."""
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > len(ranks)
    writers = Counter(name for rank in ranks for name in rank.wrote)
    assert sorted(writers) == files
    assert set(writers.values()) == {1}
    assert max(len(rank.wrote) for rank in ranks) == ceil(len(files) / len(ranks))
    sent = sum(rank.sent for rank in ranks)
    # What is to be quantized travels in fp32.
    assert (
        0 < sent == sum(rank.received for rank in ranks) < 4 * sum(f.stat().st_size for f in folder.iterdir())
    )
    assert min(rank.sent for rank in ranks) > 0  # replicas take turns
    assert max(rank.most_waiting for rank in ranks) <= (AHEAD + 1) * max(SLICE, WIDEST_ROW)


def test_all_ranks_fail_with_the_reason_of_one(pool: Pool, tmp_path: Path, single: Single) -> None:
    (tmp_path / "hf").mkdir()
    degrees = LAYOUTS["pp x cp x tp"]
    ranks = pool.run(fail, configured(["parallel=fsdp"], 1), degrees, single[0], tmp_path / "hf")
    assert all(told == ranks[0] for told in ranks)
    failed = f"RunFailed: the export {tmp_path}/hf/step-1 cannot be written: "
    assert ranks[0] == {
        "disk": f"{failed}No space left on device (a file of rank 3) and left ",
        "memory": f"{failed}rank 3 failed: RuntimeError: CUDA out of memory and left ",
        "stop": "StopEarly:  and left ",
        "directory": f"{failed}Read-only file system ({tmp_path}/hf/step-1) and left ",
    }
    # And the export after them is whole.
    assert read_manifest(tmp_path / "hf/step-1") == read_manifest(single[0] / "bf16")
    assert verify(tmp_path / "hf/step-1")
