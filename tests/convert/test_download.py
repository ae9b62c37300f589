"""direction=download, against a hub on this machine."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from dsv3.config.convert import Assets, ConvertConfig, Direction
from dsv3.convert import download as download_module
from dsv3.convert.download import download
from dsv3.errors import RunFailed, UserError
from dsv3.metrics.progress import Phase
from tests.convert.hub_server import COMMIT, Answer, Hub, serve
from tests.harness.commands import ConvertCommand
from tests.harness.outcome import refused

CONFIG = {
    "config.json",
    "generation_config.json",
    "hf_quant_config.json",
    "configuration_x.py",
    "modeling_x.py",
}

TOKENIZER = {
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tiktoken.model",
    "tokenization_x.py",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/tools.jinja",
    "vocab.json",
    "merges.txt",
}

WEIGHTS = {"model-00001-of-00001.safetensors", "model.safetensors.index.json"}

OTHERS = {"README.md", ".gitattributes", "original/consolidated.safetensors", "original/tokenizer.model"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A repository with files of every kind, as HF_ENDPOINT."""
    names = sorted(CONFIG | TOKENIZER | WEIGHTS | OTHERS)
    with serve(Hub({name: f"content of {name}".encode() for name in names})) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.address)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield served


def ask(output: Path, assets: Assets = Assets.config, **more: Any) -> ConvertConfig:
    return ConvertConfig(
        Direction.download, assets=assets, output=str(output), **{"repo": "owner/name", **more}
    )


def fetched_files(output: Path) -> set[str]:
    """Return the paths of the files in a download, without huggingface_hub's own."""
    paths = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    return {path for path in paths if not path.startswith(".cache/")}


@pytest.mark.parametrize(
    ("assets", "wanted"),
    [
        (Assets.config, CONFIG),
        (Assets.tokenizer, TOKENIZER),
        (Assets.weights, CONFIG | WEIGHTS),
        (Assets.all, CONFIG | TOKENIZER | WEIGHTS | OTHERS),
    ],
)
def test_just_the_files_asked_for_are_fetched(
    hub: Hub, tmp_path: Path, assets: Assets, wanted: set[str]
) -> None:
    output = download(ask(tmp_path / "out [1]", assets))
    assert fetched_files(output) == wanted == set(hub.fetched)
    assert all((output / name).read_bytes() == hub.files[name] for name in wanted)


def test_the_command_fetches_from_the_endpoint_with_the_users_token(
    hub: Hub, convert: ConvertCommand, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    page = f"{hub.address}/owner/name/tree/main"
    for repo in ("owner/name", "hf:owner/name", page):
        output = tmp_path / repo.replace("/", "-")
        outcome = convert.run("direction=download", f"repo={repo}", f"output={output}", "assets=config")
        assert outcome.code == 0, outcome.err
        assert fetched_files(output) == CONFIG
    assert hub.tokens == {"Bearer hf_secret"}


@pytest.mark.parametrize("revision", ["main", "v1", COMMIT])
def test_a_revision_is_a_branch_tag_or_commit(hub: Hub, tmp_path: Path, revision: str) -> None:
    assert fetched_files(download(ask(tmp_path / "out", revision=revision))) == CONFIG


REFUSALS = {
    "gated": (
        Answer(403, "GatedRepo", "Visit the page to ask for access."),
        ["403", "ask for access", "gated"],
    ),
    "token": (Answer(401, "", "Invalid username or password."), ["401", "HF_TOKEN", "Invalid username"]),
    "not found": (
        Answer(404, "RepoNotFound", "Repository not found"),
        ["404", "Repository Not Found for url"],
    ),
    "forbidden": (Answer(403, "", "plan does not allow it"), ["403", "plan does not allow it"]),
    "revision": (Answer(404, "RevisionNotFound", ""), ["has no revision="]),
}


# A commit that is listed is there: "revision" is refused at the listing alone.
@pytest.mark.parametrize(
    ("refusal", "at", "earlier"),
    [
        *((refusal, "listing", True) for refusal in REFUSALS),
        *((refusal, "fetching", True) for refusal in REFUSALS if refusal != "revision"),
        ("gated", "listing", False),
        ("gated", "fetching", False),
    ],
)
def test_a_refusal_is_told_in_the_words_of_the_hub_also_over_an_earlier_download(
    hub: Hub, tmp_path: Path, refusal: str, at: str, earlier: bool
) -> None:
    output = tmp_path / "out"
    if earlier:
        download(ask(output, Assets.tokenizer))
    before, (answer, words) = fetched_files(output), REFUSALS[refusal]
    setattr(hub, at, answer)
    with pytest.raises(UserError) as told:
        download(ask(output))
    assert all(word in str(told.value) for word in ["repo=owner/name", *words]), str(told.value)
    assert len(str(told.value).splitlines()) == 1
    assert "connection" not in str(told.value)
    assert fetched_files(output) == before


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_fault_of_the_hub_is_called_one(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    hub.listing = Answer(status, "", "come back later")
    with pytest.raises(
        RunFailed, match=f"the hub fails .HTTP {status}.*may work later.*come back later"
    ) as told:
        download(ask(tmp_path / "out"))
    assert "connection" not in str(told.value)


def test_a_hub_that_is_not_reached_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    with pytest.raises(UserError, match=f"owner/name cannot be reached, there is no connection to {address}"):
        download(ask(tmp_path / "out"))


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("HF_TOKEN", "tökén", "HF_TOKEN is no token: its character 2 is 'ö'"),
        ("HF_TOKEN", "two words", "HF_TOKEN is no token: its character 4 is ' '"),
        ("HUGGING_FACE_HUB_TOKEN", "tökén", "HUGGING_FACE_HUB_TOKEN is no token: its character 2"),
        ("HF_ENDPOINT", "", "HF_ENDPOINT='' is no address of a hub: give one that begins with https://"),
        ("HF_ENDPOINT", "hub.example", "HF_ENDPOINT='hub.example' is no address"),
        ("HF_ENDPOINT", "ftp://hub.example", "HF_ENDPOINT='ftp://hub.example' is no address"),
        ("HF_ENDPOINT", "http://[::1", "HF_ENDPOINT='http://[::1' is no address"),
        ("HF_ENDPOINT", "http://hub.example:99999999", "is no address"),
        ("HTTPS_PROXY", "ftp://user:secret@proxy", "HTTPS_PROXY is no address of a proxy"),
        ("https_proxy", "http://[::1", "https_proxy is no address of a proxy"),
    ],
)
def test_a_variable_that_no_request_can_be_made_with_is_named_and_secrets_are_not_repeated(
    hub: Hub,
    convert: ConvertCommand,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    value: str,
    told: str,
) -> None:
    monkeypatch.setenv(name, value)
    outcome = convert.run("direction=download", "repo=owner/name", f"output={tmp_path / 'out'}")
    refused(outcome, told)
    assert len(outcome.err.strip().splitlines()) == 1
    assert not ("TOKEN" in name and value in outcome.err)
    assert "secret" not in outcome.err
    assert not hub.asked


def test_a_stored_token_that_cannot_be_sent_is_the_users_mistake(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("tökén", "utf-8")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(UserError, match=r"the hub cannot be asked: .*the token of hf auth login"):
        download(ask(tmp_path / "out"))


def test_a_hub_that_may_not_be_asked_is_told_by_its_variable(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="owner/name cannot be reached: HF_HUB_OFFLINE is set"):
        download(ask(tmp_path / "out"))
    assert not hub.asked


def test_a_file_that_would_lie_outside_of_the_output_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.files["../outside.txt"] = b"x"
    with pytest.raises(UserError, match=r"'\.\./outside\.txt' would lie outside"):
        download(ask(tmp_path / "out", Assets.all))
    assert not hub.fetched


def test_a_file_that_differs_from_its_digest_is_removed_and_fetched_again(hub: Hub, tmp_path: Path) -> None:
    weights, config = sorted(WEIGHTS)[0], "config.json"  # with LFS, and without
    hub.sent = {name: hub.files[name][::-1] for name in (weights, config)}
    with pytest.raises(RunFailed, match=r"config\.json and 1 more did not have the digest.*fetches it again"):
        download(ask(tmp_path, Assets.weights))
    assert fetched_files(tmp_path) == (CONFIG | WEIGHTS) - {weights, config}
    hub.sent, hub.fetched = {}, []
    download(ask(tmp_path, Assets.weights))
    assert set(hub.fetched) == {weights, config}
    assert (tmp_path / weights).read_bytes() == hub.files[weights]


def test_a_download_that_breaks_off_goes_on(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # huggingface_hub waits before it tries again
    hub.cut = "modeling_x.py"
    with pytest.raises(RunFailed, match="the same command goes on"):
        download(ask(tmp_path / "out"))
    hub.cut = ""
    assert fetched_files(download(ask(tmp_path / "out"))) == CONFIG


def test_what_was_changed_on_the_disk_since_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    download(ask(tmp_path / "out"))
    (tmp_path / "out" / "config.json").write_bytes(hub.files["config.json"][::-1])
    try:
        download(ask(tmp_path / "out"))
    except RunFailed:
        download(ask(tmp_path / "out"))
    assert (tmp_path / "out" / "config.json").read_bytes() == hub.files["config.json"]


def test_an_output_in_use_is_refused_and_left_alone(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not empty"):
        download(ask(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match="is a file"):
        download(ask(tmp_path / "mine.txt"))
    assert not hub.fetched


def test_a_repository_without_such_files_is_named(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"pytorch_model.bin": b"x", "README.md": b"y"}
    with pytest.raises(UserError, match=r"assets=weights; its weights are in \.bin files"):
        download(ask(tmp_path / "out", Assets.weights))
    assert not (tmp_path / "out").exists()


def test_what_is_no_name_of_a_repository_is_refused(
    hub: Hub, convert: ConvertCommand, tmp_path: Path
) -> None:
    outcome = convert.run("direction=download", "repo=a//b", f"output={tmp_path / 'out'}")
    refused(outcome, "repo=a//b is no repository name")


def test_the_bytes_are_counted_and_no_other_bar_is_shown(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[int, int | None]] = []
    phases: list[Phase] = []
    counting_bar, fetch = download_module._counting_bar, huggingface_hub.snapshot_download

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
        fetch(repo, tqdm_class=tqdm_class, **asked)

    def remember(work: Phase) -> Any:
        phases.append(work)
        return counting_bar(work)

    monkeypatch.setattr(download_module, "_counting_bar", remember)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", play)
    download(ask(tmp_path / "out"))
    assert seen == [(3000, 4000)]
    assert capsys.readouterr() == ("", "")
