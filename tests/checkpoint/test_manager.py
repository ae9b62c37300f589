import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dsv3.checkpoint import directory, retention, save
from dsv3.checkpoint.dcp_metadata import read_metadata
from dsv3.checkpoint.directory import Progress, complete_steps, step_directory
from dsv3.checkpoint.load import load_weights
from dsv3.checkpoint.manager import CheckpointManager
from dsv3.config.checkpoint import CheckpointConfig
from dsv3.config.model import ModelConfig
from dsv3.distributed.process_group import RankContext
from dsv3.errors import UserError
from dsv3.training.optimizer import BF16MomentAdamW
from tests.harness.checkpoints import tensors, unseal
from tests.harness.trained import ALONE, Trained


def _restore(run_dir: Path, into: Trained) -> Progress | None:
    return into.restore(run_dir)


def test_restoring_gives_back_model_moments_and_progress_bit_for_bit(run_dir: Path, trained: Trained) -> None:
    trained.step()
    trained.save(run_dir)
    other = Trained(seed=1)
    progress = _restore(run_dir, other)
    assert progress == trained.progress == Progress(step=2, samples=8, tokens=64)
    assert other.state() == trained.state()


def test_what_is_compared_holds_biases_moments_and_steps(trained: Trained) -> None:
    """The test above compares nothing if these are missing or all alike."""
    state, other = trained.state(), Trained(seed=1).state()
    for part in ("selection_bias", "exp_avg", "exp_avg_sq", "embedding.weight", "mtp"):
        names = [name for name in state if part in name]
        assert names
        assert all(state[name] != other[name] for name in names)
    assert any(name.endswith(".step") for name in state)


def test_a_restored_optimizer_goes_on_as_the_old_one(run_dir: Path, trained: Trained) -> None:
    trained.step()
    trained.save(run_dir)
    other = Trained(seed=1)
    _restore(run_dir, other)
    other.random.set_state(trained.random.get_state())
    trained.step()
    other.step()
    assert other.state() == trained.state()


def test_restoring_gives_back_the_random_state(run_dir: Path, trained: Trained) -> None:
    torch.manual_seed(3)
    trained.save(run_dir)
    expected = torch.rand(4)
    torch.manual_seed(4)
    _restore(run_dir, Trained(seed=1))
    assert torch.equal(torch.rand(4), expected)


def test_moments_of_another_precision_are_rounded_or_widened(run_dir: Path, trained: Trained) -> None:
    trained.save(run_dir)
    half, whole = Trained(seed=1), Trained(seed=2)
    half.optimizer = BF16MomentAdamW(half.model.parameters(), lr=0.01)
    half.restore(run_dir)
    stored, read = (each.optimizer.state_dict()["state"] for each in (trained, half))
    for number, moments in stored.items():
        assert all(read[number][key].equal(moments[key].bfloat16()) for key in ("exp_avg", "exp_avg_sq"))
        assert read[number]["step"] == moments["step"] == 1
    half.step()
    half.save(run_dir)
    whole.restore(run_dir)
    stored, read = (each.optimizer.state_dict()["state"] for each in (half, whole))
    for number, moments in stored.items():
        assert all(read[number][key].equal(moments[key].float()) for key in ("exp_avg", "exp_avg_sq"))


def test_the_learning_rate_comes_from_the_config(run_dir: Path, trained: Trained) -> None:
    trained.save(run_dir)
    other = Trained(seed=1, lr=0.5)
    _restore(run_dir, other)
    assert other.optimizer.param_groups[0]["lr"] == 0.5


def test_a_run_without_a_checkpoint_restores_nothing(run_dir: Path) -> None:
    other = Trained(seed=1)
    before = other.state()
    assert _restore(run_dir, other) is None
    assert other.state() == before


def test_a_checkpoint_holds_tensors_and_nothing_else(step: Path) -> None:
    entries = read_metadata(step).state_dict_metadata
    assert all(isinstance(entry, TensorStorageMetadata) for entry in entries.values())
    assert {name.partition(".")[0] for name in entries} == {"model", "optimizer", "random"}


def test_a_checkpoint_describes_itself(step: Path, trained: Trained) -> None:
    stored = yaml.safe_load((step / "model.yaml").read_text())
    parsed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), stored))
    assert parsed == trained.model.config
    assert (step / "tokenizer" / "tokenizer.json").read_text() == "{}"


def test_weights_are_loaded_without_optimizer_or_progress(step: Path, trained: Trained) -> None:
    other = Trained(seed=1)
    moments = other.optimizer.state_dict()["state"][0]["exp_avg"].clone()
    (step / "state.json").unlink()
    load_weights([other.model], step)
    for name, value in trained.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], value)
    assert torch.equal(other.optimizer.state_dict()["state"][0]["exp_avg"], moments)


def test_a_model_with_more_layers_is_told_which_tensor_is_missing(step: Path) -> None:
    with pytest.raises(UserError, match=r"no tensor 'model\.layers\.2\..*it was saved from another model"):
        load_weights([Trained(seed=1, num_layers=3).model], step)


def test_a_model_of_another_width_is_told_both_shapes(step: Path) -> None:
    with pytest.raises(
        UserError, match=r"'model\.embedding\.weight' has shape \[300, 32\], the model needs \[300, 48\]"
    ):
        load_weights([Trained(seed=1, dim=48).model], step)


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_only_the_last_checkpoints_are_kept(run_dir: Path, trained: Trained, keep: int) -> None:
    trained.progress.step = 8  # 9, 10 and 11 sort by number, not by name
    kept = CheckpointManager(run_dir, CheckpointConfig(keep_last=keep), ALONE)
    for _ in range(3):
        kept.save([trained.model], trained.optimizer, trained.step())
    kept.wait()
    wanted = [step_directory(run_dir, step) for step in (9, 10, 11)[-keep:]]
    assert complete_steps(run_dir) == wanted
    assert sorted((run_dir / "checkpoints").iterdir()) == sorted([*wanted, run_dir / "checkpoints/latest"])


def test_a_second_save_of_the_same_step_writes_nothing(run_dir: Path, trained: Trained) -> None:
    once = CheckpointManager(run_dir, CheckpointConfig(), ALONE)
    saved = once.save([trained.model], trained.optimizer, trained.progress)
    once.wait()
    before = saved.stat()
    once.save([trained.model], trained.optimizer, trained.progress)
    resumed = CheckpointManager(run_dir, CheckpointConfig(), ALONE)
    resumed.restore([trained.model], trained.optimizer)
    resumed.save([trained.model], trained.optimizer, trained.progress)
    resumed.wait()
    assert (saved.stat().st_ino, saved.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_checkpoint_of_another_run_at_the_same_step_is_replaced(run_dir: Path, trained: Trained) -> None:
    Trained(seed=1).save(run_dir)
    saved = trained.save(run_dir)
    other = Trained(seed=2)
    _restore(run_dir, other)
    assert other.state() == trained.state()
    assert complete_steps(run_dir) == [saved]


def test_a_checkpoint_is_complete_before_it_has_its_name(
    run_dir: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    def watched(partial: Path, target: Path, synced: Any) -> None:
        assert not target.exists()
        names = {path.name for path in partial.iterdir()}
        assert names == {
            ".metadata",
            "__0_0.distcp",
            "manifest.json",
            "model.yaml",
            "state.json",
            "tokenizer",
        }
        directory.commit(partial, target, synced)

    monkeypatch.setattr(save, "commit", watched)
    trained.save(run_dir)
    assert len(complete_steps(run_dir)) == 1


class Crash(BaseException):
    """Stands for a kill: no code may handle it."""


def _crash(*_: Any, **__: Any) -> None:
    raise Crash


def _while_writing_tensors(patch: pytest.MonkeyPatch) -> None:
    def half(partial: Path, *_: Any) -> None:
        (partial / "__0_0.distcp").write_bytes(b"half")
        raise Crash

    patch.setattr(save, "save_tensors", half)


def _before_the_description(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(save, "write_text", _crash)


def _before_the_progress(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Progress, "write", _crash)


def _before_the_tokenizer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("dsv3.checkpoint.save.shutil.copytree", _crash)


def _while_digesting(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("dsv3.tokens.file_digests.digest", _crash)


def _before_the_manifest(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(save, "write_manifest", _crash)


def _before_the_commit(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(save, "commit", _crash)


def _before_the_sync(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(directory, "sync", _crash)


def _before_the_rename(patch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def crash(self: Path, target: Path) -> Path:
        if target.name == "step-2":
            raise Crash
        return rename(self, target)

    patch.setattr(Path, "rename", crash)


def _between_rename_and_prune(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(retention, "remove", _crash)


def _before_the_pointers(patch: pytest.MonkeyPatch) -> None:
    def crash(run_dir: Path, name: str, step: Path | None) -> None:
        if step is not None and step.name == "step-2":
            raise Crash
        directory.point(run_dir, name, step)

    patch.setattr(retention, "point", crash)


def _while_removing(patch: pytest.MonkeyPatch) -> None:
    rmtree = shutil.rmtree

    def half(path: Path, ignore_errors: bool = False) -> None:
        if path.name.endswith("step-1") and path.exists():
            (path / ".metadata").unlink()
            raise Crash
        rmtree(path, ignore_errors=ignore_errors)

    patch.setattr("dsv3.checkpoint.directory.shutil.rmtree", half)


STAGES: list[tuple[Callable[[pytest.MonkeyPatch], None], int]] = [
    (_while_writing_tensors, 1),
    (_before_the_description, 1),
    (_before_the_progress, 1),
    (_before_the_tokenizer, 1),
    (_while_digesting, 1),
    (_before_the_manifest, 1),
    (_before_the_commit, 1),
    (_before_the_sync, 1),
    (_before_the_rename, 1),
    (_before_the_pointers, 2),
    (_between_rename_and_prune, 2),
    (_while_removing, 2),
]


@pytest.mark.parametrize("async_save", [True, False])
@pytest.mark.parametrize(("stage", "newest"), STAGES, ids=lambda value: getattr(value, "__name__", value))
def test_a_crash_at_any_stage_leaves_the_newest_complete_checkpoint_usable(
    run_dir: Path,
    trained: Trained,
    monkeypatch: pytest.MonkeyPatch,
    stage: Callable[[pytest.MonkeyPatch], None],
    newest: int,
    async_save: bool,
) -> None:
    states = {1: trained.state()}
    trained.save(run_dir, keep_last=1)
    trained.step()
    states[2] = trained.state()
    with monkeypatch.context() as patch:
        stage(patch)
        with pytest.raises(Crash):
            trained.save(run_dir, keep_last=1, async_save=async_save)
    for complete in complete_steps(run_dir):
        assert f"step-{Progress.read(complete).step}" == complete.name
        assert tensors(complete)
    after = Trained(seed=1)
    progress = _restore(run_dir, after)
    assert progress is not None
    assert progress.step == newest
    assert after.state() == states[newest]
    # Nothing half-written is left, and the pointer leads to what was restored, even after the next crash.
    kept = {path.name for path in complete_steps(run_dir)}
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == kept | {"latest"}
    assert (run_dir / "checkpoints/latest").resolve().name == f"step-{newest}"
    trained.save(run_dir, keep_last=1)
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"step-2", "latest"}


def test_only_the_main_rank_sweeps(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leftover = run_dir / "checkpoints" / ".partial-step-3"
    leftover.mkdir(parents=True)
    monkeypatch.setattr(RankContext, "in_background", lambda self: self)  # there is no process group
    CheckpointManager(run_dir, CheckpointConfig(), RankContext(1, 1, 2, torch.device("cpu")))
    assert leftover.exists()
    CheckpointManager(run_dir, CheckpointConfig(), ALONE)
    assert not leftover.exists()


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_end_the_run(
    run_dir: Path, trained: Trained, tmp_path: Path
) -> None:
    """A link cannot be deleted as a folder; on NFS an open file cannot either."""
    first = trained.save(run_dir, keep_last=1)
    first.rename(tmp_path / "elsewhere")
    first.symlink_to(tmp_path / "elsewhere")
    trained.step()
    second = trained.save(run_dir, keep_last=1)
    assert complete_steps(run_dir) == [second]


@pytest.mark.parametrize("old", [False, True], ids=["with a manifest", "older than manifests"])
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_checkpoint_is_told_with_its_path(step: Path, name: str, damage: str, old: bool) -> None:
    if old:
        unseal(step)
    if damage == "missing":
        (step / name).unlink()
    else:
        content = (step / name).read_bytes()
        (step / name).write_bytes(content[: len(content) // 2])
    told = str(step) if old else f"{step / name} is {damage}"
    with pytest.raises(UserError, match=told) as caught:
        _restore(step.parent.parent, Trained(seed=1))
    assert len(str(caught.value).splitlines()) == (1 if old else 2)


def test_a_checkpoint_without_a_manifest_loads_as_before(step: Path, trained: Trained) -> None:
    unseal(step)
    other = Trained(seed=1)
    _restore(step.parent.parent, other)
    assert other.state() == trained.state()
