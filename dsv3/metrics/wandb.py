"""Weights & Biases, offline unless the user is logged in, and never a reason for a training to stop."""

import html
import netrc
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dsv3.config.logger import WandbMode
from dsv3.metrics.loggers import Tell, tell_on_stderr
from dsv3.metrics.row import MetricsRow

# Seconds that a server out of reach may hold up the start and the end of a run.
INIT_TIMEOUT = 30.0

FINISH_TIMEOUT = 60.0

OLD_MODES = {"dryrun": "offline", "run": "online"}


class WandbLogger:
    """Logs to wandb under `run_dir/wandb`; a run that is opened again goes on under its old wandb id.

    The arguments are the fields of WandbLoggerConfig. Whatever wandb raises becomes one warning, and the
    run goes on without it: metrics.jsonl has the same numbers.
    """

    def __init__(
        self,
        project: str = "dsv3",
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        mode: WandbMode = WandbMode.auto,
    ) -> None:
        self._identity: dict[str, Any] = {"project": project, "entity": entity, "group": group}
        self._tags = list(tags)
        self._name = name
        self._mode = mode
        self._run: Any = None
        self._tell: Tell = tell_on_stderr

    def open(
        self,
        run_dir: Path,
        config: Mapping[str, object],
        files: Sequence[Path] = (),
        tell: Tell = tell_on_stderr,
    ) -> None:
        """Start the run, or go on with the one whose id `run_dir` holds.

        `files` are copied as they are now.
        """
        self._tell = tell
        mode = resolve_mode(self._mode, os.environ)
        if mode == "online" and not logged_in(os.environ):
            # wandb would ask for a key at the terminal, with the other ranks waiting.
            tell("warning: wandb: not logged in (`wandb login`, or set WANDB_API_KEY), recording offline")
            mode = "offline"
        if mode != "disabled":
            self._guard(lambda: self._start(run_dir, mode, config, files))

    def log(self, row: MetricsRow) -> None:
        """Hand over one row (about 0.2 ms); wandb writes it in a process of its own."""
        if self._run is not None:
            self._guard(lambda: self._run.log({"step": row.step, **row.scalars()}))

    def text(self, key: str, text: str, step: int) -> None:
        """Record `text` as a panel with a slider over the steps."""
        if self._run is not None:
            self._guard(lambda: self._run.log({"step": step, key: _panel(text)}))

    def finish(self, exit_code: int = 0) -> None:
        """Close the run; waits at most FINISH_TIMEOUT seconds for uploads. A second call does nothing."""
        run, self._run = self._run, None
        if run is not None:
            self._guard(lambda: run.finish(exit_code=exit_code))

    def _start(self, run_dir: Path, mode: Any, config: Mapping[str, object], files: Sequence[Path]) -> None:
        import wandb

        self._run = wandb.init(
            **self._identity,
            tags=self._tags,
            # The last two folders: of a sweep's job the number alone would say nothing.
            name=self._name or "/".join(run_dir.absolute().parts[-2:]),
            id=run_id(run_dir),
            resume="allow",
            dir=str(run_dir),
            mode=mode,
            config=dict(config),
            allow_val_change=True,  # a resume may change the layout
            reinit="create_new",  # leaves wandb.run, a global, alone
            settings=_settings(),
        )
        # Rows that a resume repeats lie below the last step: as wandb's own step they would be dropped.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        for path in files:
            # save() would link to a file elsewhere and, however silent, warn about it.
            copy = shutil.copyfile(path, Path(self._run.dir, path.name))
            self._run.save(str(copy), base_path=self._run.dir, policy="now", glob=False)
        if mode == "online":
            self._tell(f"wandb: {self._run.url}")

    def _guard(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # wandb raises errors of many kinds, and none is worth a training run
            self._run = None
            reason = " ".join(str(error).split()) or type(error).__name__
            self._tell(f"warning: wandb is off for this run: {reason[:200]}")


def resolve_mode(mode: WandbMode, environ: Mapping[str, str]) -> str:
    """The mode wandb gets: the config's, else WANDB_MODE, else online for a user who is logged in."""
    if mode is not WandbMode.auto:
        return str(mode.value)
    if named := environ.get("WANDB_MODE"):
        return OLD_MODES.get(named, named)
    return "online" if logged_in(environ) else "offline"


def logged_in(environ: Mapping[str, str]) -> bool:
    """Whether wandb will find a key for its server, told without a network."""
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    try:
        path = Path(environ.get("NETRC") or "~/.netrc").expanduser()
        return bool(host in netrc.netrc(path).hosts)
    except (OSError, RuntimeError, UnicodeDecodeError, netrc.NetrcParseError):
        return False


def run_id(run_dir: Path) -> str:
    """The wandb id of a run, made and kept in `run_dir/wandb/run-id.txt` when asked for the first time."""
    path = run_dir / "wandb" / "run-id.txt"
    kept = path.read_text(encoding="utf-8").strip() if path.exists() else ""
    if kept:
        return kept
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = secrets.token_hex(4)
    path.write_text(fresh + "\n", encoding="utf-8")
    return fresh


def _settings() -> Any:
    """A quiet wandb that neither looks around (git, code, packages, hardware) nor samples the machine."""
    import wandb

    return wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
        init_timeout=INIT_TIMEOUT,
        finish_timeout=FINISH_TIMEOUT,
        summary_warnings=0,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )


def _panel(text: str) -> Any:
    import wandb

    return wandb.Html(f"<pre style='white-space:pre-wrap'>{html.escape(text)}</pre>", inject=False)
