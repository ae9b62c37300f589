"""data=hf: a local dataset streams as the hub's does; any world reads the same batches, and resumes them."""

import json
import pickle
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dsv3.checkpoint.directory import complete_steps
from dsv3.config.data import HubDataConfig
from dsv3.data import dataset_files, hub_stream
from dsv3.data.hub_stream import HubData
from dsv3.data.lanes import LaneRows
from dsv3.data.loader import DataLoader
from dsv3.data.sources import PreparedData
from dsv3.errors import RunFailed, UserError
from dsv3.planning.batch_schedule import BatchSchedule
from dsv3.tokens.data_record import DataChange
from dsv3.tokens.tokenizer import Tokenizer
from tests.data.texts import sentence
from tests.harness.checkpoints import last_tensors
from tests.harness.commands import TrainCommand
from tests.harness.runs import rows
from tests.harness.tiny import MODEL, TRAINING
from tests.harness.trained import killed_in_step

datasets = pytest.importorskip("datasets")

DOCUMENTS = 90


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("DSV3_CACHE", str(tmp_path / "cache"))


def json_lines(folder: Path, files: int = 3) -> Path:
    folder.mkdir()
    for file in range(files):
        with (folder / f"train-{file}.jsonl").open("w") as out:
            for number in range(file, DOCUMENTS, files):
                out.write(json.dumps({"text": sentence(number), "n": number}) + "\n")
    return folder


def parquet(folder: Path) -> Path:
    arrow, files = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder.mkdir()
    table = arrow.table({"n": list(range(DOCUMENTS)), "text": [sentence(n) for n in range(DOCUMENTS)]})
    files.write_table(table, folder / "train.parquet", row_group_size=10)
    return folder


def prepared(tokenizer: Tokenizer, folder: Path, **options: Any) -> PreparedData:
    return HubData(str(folder), **{"lanes": 4, "lane_rows": 2, **options}).prepare(tokenizer, 32, 7)


def batches(data: PreparedData, rank: int, world: int, steps: range) -> list[Any]:
    assert data.train is not None
    loader = DataLoader(data.train, BatchSchedule(8), 1, rank, world)
    return [
        [(batch.tokens.tolist(), batch.documents.tolist()) for batch in loader.microbatches(8 * step)]
        for step in steps
    ]


@pytest.mark.parametrize("make", [json_lines, parquet])
def test_worlds_and_resumes_draw_the_same_batches(tokenizer: Tokenizer, tmp_path: Path, make: Any) -> None:
    folder = make(tmp_path / "set")
    data = prepared(tokenizer, folder)
    alone = batches(data, 0, 1, range(6))
    assert isinstance(data.train, LaneRows)
    kept = {lane: list(place) for lane, place in data.train.bookmarks(8 * 3).items()}
    source = HubData(str(folder), lanes=4, lane_rows=2)
    recipe = pickle.dumps(data.recipe)
    for resumed in (False, True):
        ranks = []
        for rank in range(2):
            other = source.reopen(pickle.loads(recipe), tokenizer, 32, 7)
            assert other.fingerprint == data.fingerprint
            assert isinstance(other.train, LaneRows)
            other.train.go_on(kept if resumed else {})
            ranks.append(batches(other, rank, 2, range(3 if resumed else 0, 6)))
            assert len(other.train._lanes) == 2
        together = [left + right for left, right in zip(*ranks, strict=True)]
        assert together == alone[3 if resumed else 0 :]
    # A lane of Parquet has groups of rows of its own; the lanes of fewer files share them.
    assert data.summary["pieces"] == {json_lines: 3, parquet: 9}[make]


def test_no_held_out_document_is_trained_on_and_no_other_is_left_out(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = json_lines(tmp_path / "set")
    with (folder / "train-2.jsonl").open("a") as out:  # the same text in another file stays on its side
        for number in range(DOCUMENTS):
            out.write(json.dumps({"text": sentence(number)}) + "\n")
            out.write(json.dumps({"text": f"{sentence(number)}\0"}) + "\n")  # no text, as in files
    data = prepared(tokenizer, folder, held_out=0.2, lanes=2, lane_rows=1)
    assert data.train is not None
    scored = [data.held_out.row(index) for index in range(len(data.held_out))]
    held_out = split_texts(tokenizer, np.concatenate([row.tokens[:-1] for row in scored]))
    trained = set()
    for lane in range(2):
        stream = [data.train.row(index).tokens[:-1] for index in range(lane, 1100, 2)]
        assert "\0" not in tokenizer.decode(np.concatenate(stream).tolist())
        trained |= split_texts(tokenizer, np.concatenate(stream))
    everything = {sentence(number) for number in range(DOCUMENTS)}
    assert not held_out & trained
    assert 5 < len(held_out) < 35
    assert held_out | trained == everything
    again = prepared(tokenizer, folder, held_out=0.2)  # from the cache
    assert len(again.held_out) == len(data.held_out)


def split_texts(tokenizer: Tokenizer, ids: np.ndarray) -> set[str]:
    """Return the whole documents in a stream of ids, the first and the last one left out."""
    ends = np.flatnonzero(ids == tokenizer.eos) + 1
    parts = np.split(ids, ends)
    texts = {tokenizer.decode(part.tolist()) for part in parts}
    return {text for text in texts if text.startswith("# text") and text.endswith("\n")} & {
        sentence(number) for number in range(DOCUMENTS)
    }


def test_another_split_is_held_out_and_its_texts_are_not_trained_on(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = json_lines(tmp_path / "set", 1)
    with (folder / "validation.jsonl").open("w") as out:
        out.writelines(json.dumps({"text": sentence(number)}) + "\n" for number in (3, 200, 201))
    data = prepared(tokenizer, folder, held_out_split="validation", lanes=1, lane_rows=1)
    assert data.summary["documents_held_out"] == 3
    assert data.train is not None
    stream = np.concatenate([data.train.row(index).tokens[:-1] for index in range(700)])
    trained = split_texts(tokenizer, stream)
    assert sentence(3) not in trained
    assert len(trained) == DOCUMENTS - 1
    monkeypatch.setattr(hub_stream, "HELD_OUT_CHARACTERS", 100)  # a split of any size is a bounded set
    bounded = prepared(tokenizer, json_lines(tmp_path / "more"), held_out_split="train", split="train")
    assert bounded.summary["documents_held_out"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "owner/name"}, r"hub cannot be reached: .*\n.*task=prepare task.input=hf:owner/name"),
        ({"dataset": "./nowhere"}, r"\./nowhere is no directory"),
        ({"split": "test"}, r"no split test: it has train"),
        ({"field": "body"}, r"no column body: data.field is one of text, n"),
        ({"field": "n"}, r"column n holds int64 and no text"),
    ],
)
def test_mistakes_are_told(
    tokenizer: Tokenizer, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    options = {"dataset": str(json_lines(tmp_path / "set")), **options}
    with pytest.raises(UserError, match=message):
        HubData(**options).prepare(tokenizer, 32, 7)


def test_a_file_that_cannot_be_read_ends_the_run_with_its_place(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = json_lines(tmp_path / "set", 1)
    data = prepared(tokenizer, folder, lanes=1, lane_rows=1)
    assert data.train is not None
    with (folder / "train-0.jsonl").open("w") as out:
        out.write("{no json\n" * 9)
    with pytest.raises(UserError, match=r"train-0\.jsonl \(piece 0\) cannot .*\n.*task=prepare task.input=/"):
        data.train.row(0)
    (folder / "train-0.jsonl").unlink()
    with pytest.raises(RunFailed, match=r"train-0\.jsonl \(piece 0\) .* row 0: FileNotFound"):
        data.train.row(0)


def test_a_hub_that_is_away_is_told_soon_and_by_us_alone(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Nobody:
        def head(self, url: str, timeout: float) -> None:
            assert url.endswith("/api/datasets/owner/name")
            raise ConnectionError("nobody answers")

    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_session", Nobody)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(UserError, match=r"owner/name is not here, .* cannot be reached: .*nobody answers\n"):
        HubData("owner/name").prepare(None, 32, 7)  # type: ignore[arg-type]
    assert "Retrying" not in "".join(capfd.readouterr())
    assert not datasets.config.HF_HUB_OFFLINE
    assert not hub.constants.HF_HUB_OFFLINE


def test_changed_files_are_named_wherever_they_lie(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = json_lines(tmp_path / "set")
    data = prepared(tokenizer, folder)
    moved = folder.rename(tmp_path / "moved")
    (moved / "train-0.jsonl").touch()
    same = prepared(tokenizer, moved)
    assert (same.fingerprint, same.record) == (data.fingerprint, data.record)
    with (moved / "train-1.jsonl").open("a") as out:
        out.write(json.dumps({"text": "more"}) + "\n")
    other = prepared(tokenizer, moved)
    assert other.fingerprint != data.fingerprint
    assert DataChange.between(data.record, other.record).told == "1 file changed (train: train-1.jsonl)"


def test_a_commit_that_leaves_the_files_alone_is_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = {"datasets/o/n@ab/a.parquet": {"size": 5, "blob_id": "x"}}
    blobs["datasets/o/n@cd/a.parquet"] = {"size": 5, "blob_id": "x"}
    listing = SimpleNamespace(find=lambda root, detail: {p: b for p, b in blobs.items() if root[5:] in p})
    monkeypatch.setattr("huggingface_hub.HfFileSystem", lambda: listing)

    def pieces(commit: str) -> list[Any]:
        files = {"train": [f"hf://datasets/o/n@{commit}/a.parquet"]}
        return list(dataset_files.dataset_pieces(files, {}))

    assert pieces("ab") == pieces("cd") == [("train: hf://datasets/o/n/a.parquet", 5, "x", None, None)]
    blobs["datasets/o/n@cd/a.parquet"]["blob_id"] = "y"
    assert pieces("ab") != pieces("cd")


def test_large_files_enter_the_fingerprint_by_stretches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_files, "SAMPLE", 100)
    content = bytearray(np.random.default_rng(0).bytes(10_000))
    (tmp_path / "a").write_bytes(content)
    whole, sampled = (dataset_files._sample(tmp_path / "a", share) for share in (1.0, 0.2))
    assert whole != sampled
    content[0] ^= 1
    (tmp_path / "a").write_bytes(content)
    assert dataset_files._sample(tmp_path / "a", 1.0) != whole
    assert dataset_files._sample(tmp_path / "a", 0.2) != sampled


def test_lanes_follow_from_the_batch_alone() -> None:
    config = HubDataConfig(dataset="owner/name")
    for batch, expected in [(8, (8, 1)), (64, (64, 1)), (3072, (64, 48)), (15360, (64, 240)), (7, (7, 1))]:
        done = config.completed(batch, False)
        assert (done.lanes, done.lane_rows) == expected
    assert HubDataConfig(dataset="d", lanes=128).completed(3072, False).lane_rows == 24
    assert "no multiple of the 128" in config.completed(3072, False).notes(128)[0]
    assert config.completed(3072, False).notes(16) == []
    with pytest.raises(UserError, match=r"train.batch_ramp.*task=prepare"):
        config.completed(8, True)
    with pytest.raises(UserError, match=r"lanes=5.*must divide train.global_batch_size=8"):
        HubDataConfig(dataset="d", lanes=5).completed(8, False)


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(
    commands: TrainCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    source = ["data=hf", f"data.dataset={json_lines(tmp_path / 'set')}", "data.lanes=2"]
    settings = [*MODEL, *TRAINING, *source, "train.steps=8", "train.checkpoint_every=3"]
    settings += ["train.microbatch_size=4", "train.evaluate_every=3", "train.generate_every=0"]

    def run(place: Path) -> None:
        commands.must(*settings, f"run.dir={place}")

    run(straight)
    with killed_in_step(monkeypatch, 6):
        run(killed)
    assert [path.name for path in complete_steps(killed)] == ["step-3"]
    stored = json.loads((killed / "checkpoints" / "step-3" / "state.json").read_text())
    assert set(stored["bookmarks"]) == {"0", "1"}
    assert all(place[0] == stored["samples"] // 2 for place in stored["bookmarks"].values())
    commands.must(f"resume={killed}")
    assert rows(killed) == rows(straight)
    assert last_tensors(killed) == last_tensors(straight)
