"""The Weights & Biases logger: offline unless the user is logged in, and never a reason to stop a run."""

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
from dsv3.metrics.loggers import Notify, print_to_stderr
from dsv3.metrics.row import MetricsRow
from dsv3.untrusted_files import read_text

# Seconds that an unreachable server may delay the start and the end of a run.
INIT_TIMEOUT = 30.0

FINISH_TIMEOUT = 60.0

NOT_LOGGED_IN = "not logged in (`wandb login`, or set WANDB_API_KEY)"

OLD_MODES = {"dryrun": "offline", "run": "online"}


class WandbLogger:
    """Log to wandb under `run_dir/wandb`; a resumed run continues under its old wandb id.

    Offline, each part of a run has a folder of its own, which counts its steps from 0. They carry the same id
    and the wish to resume, by which `wandb sync RUN_DIR/wandb` makes them one run and numbers the steps on.

    The arguments are the fields of WandbLoggerConfig. Any error of wandb becomes one warning, and the run
    goes on without it: metrics.jsonl has the same values.
    """

    def __init__(
        self,
        project: str = "dsv3",
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: Sequence[str] | None = None,
        notes: str | None = None,
        mode: WandbMode = WandbMode.auto,
    ) -> None:
        self._identity: dict[str, Any] = {
            "project": project,
            "entity": entity,
            "group": group,
            "job_type": job_type,
            "notes": notes,
        }
        self._tags = list(tags or ())
        self._name = name
        self._mode = mode
        self._run: Any = None
        self._notify: Notify = print_to_stderr

    def open(
        self,
        run_dir: Path,
        config: Mapping[str, object],
        files: Sequence[Path] = (),
        notify: Notify = print_to_stderr,
    ) -> None:
        """Start the run, or continue the one whose id `run_dir` holds; `files` are copied as they are now."""
        self._notify = notify
        mode, _ = effective_mode(self._mode, os.environ)
        if mode == "offline" and resolve_mode(self._mode, os.environ) == "online":
            # wandb would ask for a key at the terminal, with the other ranks waiting.
            notify(f"warning: wandb: {NOT_LOGGED_IN}, recording offline")
        if mode != "disabled":
            self._guard(lambda: self._start(run_dir, mode, config, files))

    def log(self, row: MetricsRow) -> None:
        """Pass one row to wandb (about 0.2 ms), which writes it in a process of its own."""
        if self._run is not None:
            self._guard(lambda: self._run.log({"step": row.step, **row.scalars()}))

    def text(self, key: str, text: str, step: int) -> None:
        """Record `text` as a panel with a slider over the steps."""

        def log_panel() -> None:
            import wandb

            markup = f"<pre style='white-space:pre-wrap'>{html.escape(text)}</pre>"
            self._run.log({"step": step, key: wandb.Html(markup, inject=False)})

        if self._run is not None:
            self._guard(log_panel)

    def finish(self, exit_code: int = 0) -> None:
        """Close the run, and wait at most FINISH_TIMEOUT seconds for uploads; a second call does nothing."""
        run, self._run = self._run, None
        if run is not None:
            self._guard(lambda: run.finish(exit_code=exit_code))

    def _start(self, run_dir: Path, mode: Any, config: Mapping[str, object], files: Sequence[Path]) -> None:
        import wandb

        self._run = wandb.init(
            **self._identity,
            tags=self._tags,
            # The last two folders: the number of a sweep's job alone would say nothing.
            name=self._name or "/".join(run_dir.absolute().parts[-2:]),
            id=run_id(run_dir),
            resume="allow",
            dir=str(run_dir),
            mode=mode,
            config=dict(config),
            allow_val_change=True,  # a resume may change the layout
            reinit="create_new",  # does not touch the global wandb.run
            # Quiet; without git, code, packages, hardware, or samples of the machine.
            settings=wandb.Settings(
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
            ),
        )
        # A resume repeats rows below the last step, which wandb would drop as its own step.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        for path in files:
            # save() would link to a file elsewhere and warn about it, silent or not.
            copy = shutil.copyfile(path, Path(self._run.dir, path.name))
            self._run.save(str(copy), base_path=self._run.dir, policy="now", glob=False)
        if mode == "online":
            self._notify(f"wandb: {self._run.url}")

    def _guard(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # wandb raises errors of many kinds, and none may end a training run
            self._run = None
            reason = " ".join(str(error).split()) or type(error).__name__
            self._notify(f"warning: wandb is off for this run: {reason[:200]}")


def resolve_mode(mode: WandbMode, environ: Mapping[str, str]) -> str:
    """Return wandb's mode: the config's, else WANDB_MODE, else online for a user who is logged in."""
    if mode is not WandbMode.auto:
        return str(mode.value)
    if named := environ.get("WANDB_MODE"):
        return OLD_MODES.get(named, named)
    return "online" if logged_in(environ) else "offline"


def effective_mode(mode: WandbMode, environ: Mapping[str, str]) -> tuple[str, str]:
    """Return the mode that a run records in, and the reason: online needs a user who is logged in."""
    resolved = resolve_mode(mode, environ)
    if resolved == "online" and not logged_in(environ):
        return "offline", NOT_LOGGED_IN
    if mode is not WandbMode.auto:
        return resolved, f"logger.mode={mode.value}"
    if named := environ.get("WANDB_MODE"):
        return resolved, f"WANDB_MODE={named}"
    return resolved, "logged in" if resolved == "online" else NOT_LOGGED_IN


def logged_in(environ: Mapping[str, str]) -> bool:
    """Return whether wandb will find a key for its server, without asking the network."""
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    try:
        path = Path(environ.get("NETRC") or "~/.netrc").expanduser()
        return bool(host in netrc.netrc(path).hosts)
    except (OSError, RuntimeError, UnicodeDecodeError, netrc.NetrcParseError):
        return False


def run_id(run_dir: Path) -> str:
    """Return the wandb id of a run; the first call creates it and stores it in `run_dir/wandb/run-id.txt`."""
    path = run_dir / "wandb" / "run-id.txt"
    kept = read_text(path).strip() if path.exists() else ""
    if kept:
        return kept
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = secrets.token_hex(4)
    path.write_text(fresh + "\n", encoding="utf-8")
    return fresh
