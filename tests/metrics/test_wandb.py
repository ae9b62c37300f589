import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb

from dsv3.config.logger import WandbMode
from dsv3.metrics.row import MetricsRow
from dsv3.metrics.wandb import WandbLogger, logged_in, resolve_mode, run_id

ROW = MetricsRow(step=1, tokens=10, loss=2.5)


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path_factory.mktemp("home") / "netrc"))


@pytest.fixture
def service() -> Iterator[None]:
    yield
    wandb.teardown()


@pytest.mark.usefixtures("service")
def test_a_run_is_recorded_offline_and_goes_on_under_its_id(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "a [run], $1"
    run_dir.mkdir()
    (run_dir / "plan.txt").write_text("the plan")
    for exit_code in (1, 0):  # the second time as a resume
        logger = WandbLogger(tags=["tagged"])
        logger.open(run_dir, {"model": {"dim": 77}}, [run_dir / "plan.txt"])
        assert wandb.run is None  # a global that is not ours
        logger.log(ROW)
        logger.text("sample", "once <b>upon", 1)
        logger.finish(exit_code)
        logger.finish(exit_code)
    records = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))
    kept = run_id(run_dir)
    assert {path.name for path in records} == {f"run-{kept}.wandb"}
    data = b"".join(path.read_bytes() for path in records)
    assert all(word in data for word in (b"loss", b"tokens", b"tagged", b"plan.txt", b"77"))
    assert b"grad_norm" not in data  # it was unknown
    (panel, *_) = run_dir.glob("wandb/offline-run-*/files/media/html/*.html")
    assert "once &lt;b&gt;upon" in panel.read_text()
    assert capfd.readouterr() == ("", "")


def test_an_init_that_fails_is_one_warning_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(**_: object) -> None:
        raise wandb.errors.CommError("the server\nis down")

    monkeypatch.setattr(wandb, "init", broken)
    told: list[str] = []
    logger = WandbLogger()
    logger.open(tmp_path, {}, notify=told.append)
    logger.log(ROW)
    logger.text("sample", "text", 1)
    logger.finish()
    assert told == ["warning: wandb is off for this run: the server is down"]


def test_a_log_that_fails_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        dir = str(tmp_path)
        step = 0

        def define_metric(self, *_: object, **__: object) -> None: ...

        def log(self, *_: object, **__: object) -> None:
            raise BrokenPipeError("wandb-core is gone")

    monkeypatch.setattr(wandb, "init", lambda **_: Broken())
    told: list[str] = []
    logger = WandbLogger()
    logger.open(tmp_path, {}, notify=told.append)
    logger.log(ROW)
    logger.log(ROW)
    assert told == ["warning: wandb is off for this run: wandb-core is gone"]


def test_online_without_an_account_records_offline_instead_of_asking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[object] = []

    def init(**arguments: object) -> None:
        modes.append(arguments["mode"])
        raise RuntimeError

    monkeypatch.setattr(wandb, "init", init)
    told: list[str] = []
    WandbLogger(mode=WandbMode.online).open(tmp_path, {}, notify=told.append)
    assert modes == ["offline"]
    assert "wandb login" in told[0]


def test_disabled_neither_imports_nor_writes(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from dsv3.metrics.wandb import WandbLogger\n"
        "logger = WandbLogger(); logger.open(Path(sys.argv[1]), {}); logger.finish()\n"
        "print('wandb' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "WANDB_MODE": "disabled"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (run.stdout, run.stderr) == ("False\n", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("mode", "environ", "expected"),
    [
        (WandbMode.auto, {}, "offline"),
        (WandbMode.auto, {"WANDB_API_KEY": "k"}, "online"),
        (WandbMode.auto, {"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, "disabled"),
        (WandbMode.auto, {"WANDB_MODE": "dryrun"}, "offline"),
        (WandbMode.online, {"WANDB_MODE": "disabled"}, "online"),
        (WandbMode.offline, {"WANDB_API_KEY": "k"}, "offline"),
    ],
)
def test_the_config_comes_before_the_environment_before_the_account(
    mode: WandbMode, environ: dict[str, str], expected: str, tmp_path: Path
) -> None:
    assert resolve_mode(mode, {"NETRC": str(tmp_path / "none"), **environ}) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("machine api.wandb.ai login user password key\n", True),
        ("machine github.com login user password key\n", False),
        ("default login user password key\n", False),
        ("machine api.wandb.ai nonsense", False),
        ("\udcff", False),
    ],
)
def test_a_netrc_entry_for_the_server_is_an_account(text: str, expected: bool, tmp_path: Path) -> None:
    path = tmp_path / "netrc"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    path.chmod(0o600)
    assert logged_in({"NETRC": str(path)}) is expected


def test_an_own_server_has_its_own_entry(tmp_path: Path) -> None:
    path = tmp_path / "netrc"
    path.write_text("machine wandb.corp:8080 login user password key\n")
    path.chmod(0o600)
    assert logged_in({"NETRC": str(path), "WANDB_BASE_URL": "http://wandb.corp:8080"})
    assert not logged_in({"NETRC": str(path)})


def test_a_run_keeps_its_id_and_another_gets_its_own(tmp_path: Path) -> None:
    first = run_id(tmp_path / "a")
    assert run_id(tmp_path / "a") == first
    assert run_id(tmp_path / "b") != first
    (tmp_path / "a" / "wandb" / "run-id.txt").write_text("")  # a kill in the middle of the write
    assert run_id(tmp_path / "a")
