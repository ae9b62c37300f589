"""direction=download, against a hub that the test plays."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from dsv3.config.convert import Assets, ConvertConfig, Direction
from dsv3.convert import download as download_module
from dsv3.convert.download import download
from dsv3.errors import RunFailed, UserError
from dsv3.metrics.progress import Phase


def ask(output: Path, assets: Assets = Assets.config) -> ConvertConfig:
    return ConvertConfig(Direction.download, repo="owner/name", assets=assets, output=str(output))


class Hub:
    """Stands in for snapshot_download: remembers its arguments, writes a file or raises."""

    def __init__(self, error: Exception | None = None, file: str | None = "config.json") -> None:
        self.error, self.file = error, file
        self.asked: dict[str, Any] = {}

    def __call__(self, repo: str, **asked: Any) -> str:
        self.asked = {"repo": repo, **asked}
        if self.error is not None:
            raise self.error
        Path(asked["local_dir"]).mkdir(parents=True, exist_ok=True)
        if self.file:
            (Path(asked["local_dir"]) / self.file).write_text("{}")
        return str(asked["local_dir"])


def use(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> Hub:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    return hub


@pytest.mark.parametrize(
    ("assets", "wanted", "unwanted"),
    [
        (Assets.config, "config.json", "*.safetensors"),
        (Assets.tokenizer, "tokenizer*", "*.safetensors"),
        (Assets.weights, "*.safetensors", "tokenizer*"),
    ],
)
def test_only_the_files_asked_for_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assets: Assets, wanted: str, unwanted: str
) -> None:
    hub = use(monkeypatch, Hub())
    download(ask(tmp_path / "out, 1", assets))
    assert hub.asked["repo"] == "owner/name"
    assert wanted in hub.asked["allow_patterns"]
    assert unwanted not in hub.asked["allow_patterns"]


def test_an_output_in_use_is_refused_and_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = use(monkeypatch, Hub())
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not empty"):
        download(ask(tmp_path))
    assert not hub.asked
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_unfinished_download_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = use(monkeypatch, Hub())
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / "config.json").write_text("")
    download(ask(tmp_path))
    assert hub.asked["local_dir"] == tmp_path


def test_a_repository_that_is_not_there_or_not_reached_is_the_users_to_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = RepositoryNotFoundError.__new__(RepositoryNotFoundError, "404")
    for error in (LocalEntryNotFoundError("offline"), missing):
        use(monkeypatch, Hub(error))
        with pytest.raises(UserError, match="owner/name"):
            download(ask(tmp_path / "out"))


def test_a_repository_without_such_files_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Hub(file=None))
    with pytest.raises(UserError, match="assets=weights"):
        download(ask(tmp_path / "out", Assets.weights))


def test_a_download_that_breaks_off_is_a_failure_not_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Hub(OSError("connection reset")))
    with pytest.raises(RunFailed, match="goes on"):
        download(ask(tmp_path / "out"))


def test_the_bytes_are_counted_and_no_other_bar_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[int, int | None]] = []

    def play(repo: str, tqdm_class: Any, **asked: Any) -> None:
        files = tqdm_class(total=3, desc="Fetching 3 files")
        received = tqdm_class(total=0, unit="B", name="received", disable=False)
        written = tqdm_class(total=0, unit="B", name="written")
        for bar in (received, written):
            bar.total = 4000
        files.update(1)
        received.update(100)
        written.update(3000)
        seen.append((phases[0].done, phases[0].total))
        Hub()(repo, **asked)

    phases: list[Phase] = []

    def remember(work: Phase) -> Any:
        phases.append(work)
        return counting_bar(work)

    counting_bar = download_module._counting_bar
    monkeypatch.setattr(download_module, "_counting_bar", remember)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", play)
    download(ask(tmp_path / "out"))
    assert seen == [(3000, 4000)]
    assert capsys.readouterr() == ("", "")
