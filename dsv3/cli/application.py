"""A command from its arguments to its exit code: prepare, compose, check, plan, launch."""

import contextlib
import importlib
import io
import math
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dsv3.cli.arguments import import_user_modules
from dsv3.cli.error_messages import explain_error, root_groups
from dsv3.cli.flags import check_flags, flags_first, user_config_dir, version
from dsv3.cli.user_files import UserFiles
from dsv3.config.overrides import is_multirun, job_overrides, literal_notes
from dsv3.config.registry import CONF, ROOT, command, register
from dsv3.distributed.signals import NOTHING_SAVED, Stopped, leave_on_signal
from dsv3.distributed.streams import discard, print_any_name
from dsv3.errors import DONE, FAILED, KILLED, MISTAKE, InvalidValue, RunFailed, UserError, refused_by_system
from dsv3.launch.job import SweepJob, is_first_on_node
from dsv3.launch.line_prefix import prefix_lines
from dsv3.launch.search import continue_search
from dsv3.launch.slurm import srun_variables
from dsv3.launch.sweep import (
    Sweep,
    die_with_sweep,
    in_parallel_job,
    mark_failed,
    record_result,
    share_source_with_jobs,
)
from dsv3.launch.sweep_report import describe_job, report_sweep, reported
from dsv3.metrics import progress

# Seconds that the other ranks of a node wait for the first one to report a mistake.
PATIENCE = 3.0

# Characters of a line of a message.
_LONGEST = 1000


class Application:
    """One program: composes its config with Hydra and executes every job.

    `program` is train or convert, and `root` its file in conf/. `prepare` turns the user's arguments into
    Hydra's, `execute` runs a composed config; in a sweep it gets the job's SweepJob as well.
    """

    def __init__(
        self,
        program: str,
        root: str,
        help_text: Callable[[str, Sequence[str]], str],
        prepare: Callable[[Sequence[str]], list[str]],
        execute: Callable[..., float | None],
    ) -> None:
        self.program = program
        self.root = root
        self.help_text = help_text
        self.prepare = prepare
        self.execute = execute
        self.user_modules: list[str] = []
        """Modules of run.allow_targets, whose schemas may be choices."""
        self.composed = False
        self.untouched = True
        """A stop now leaves nothing behind: no training has taken over the signals."""
        self.ended = False
        """The command has done its work: nothing is left that a stop would have to end."""
        self.failure: BaseException | None = None
        self.sweep = Sweep()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin in the process of a sweep's job, which joblib or submitit has started elsewhere."""
        self.__dict__.update(state)
        os.environ.update(srun_variables(os.environ))
        os.environ.setdefault(progress.SETTING, "lines")  # bars of several jobs would fight for a terminal
        for module in self.user_modules:
            importlib.import_module(module)
        register_resolvers(self.sweep)
        die_with_sweep()

    def run(self, argv: list[str]) -> int:
        """Execute the command and return the exit code of the contract."""
        verbose = "HYDRA_FULL_ERROR" in os.environ
        os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra would print errors itself and exit with 1
        os.environ.update(srun_variables(os.environ))
        register_resolvers(self.sweep)
        print_any_name()
        # Until training handles signals there is nothing to save. A sweep reports what its jobs have done.
        with leave_on_signal(self._last_words, self._is_sweep, over=lambda: self.ended):
            try:
                return self._run(argv, verbose)
            finally:
                self.sweep.close()

    def _run(self, argv: list[str], verbose: bool) -> int:
        """Execute the command, with Python's own traceback of an error where `verbose`."""
        try:
            flags = check_flags(argv, self.program)
            self.user_modules = import_user_modules(argv)
            own = user_config_dir(argv)
            if flags.help or "--version" in argv:
                self.untouched = False
                print(self.help_text(" ".join(command(self.program)), argv) if flags.help else version())
                return _flushed()
            with progress.phase("reading the command line"):
                register()
                arguments = ["--hydra-help"] if flags.hydra_help else flags_first(self.prepare(argv))
                UserFiles(arguments, own).check()
            for note in literal_notes(argv) if is_first_on_node() else []:
                print(note, file=sys.stderr)
            if is_multirun(argv) and not {"-c", "--cfg", "-i", "--info"} & set(argv):
                self.untouched = False
                share_source_with_jobs(ROOT)
                self.sweep.arguments = arguments
                left = continue_search(arguments, self.sweep, own)
                if left is None:
                    report_sweep(self.sweep)
                    return DONE
                arguments = [*arguments, *left]
            sys.argv = [f"{self.program}.py", *arguments]
            # Hydra looks for a relative config_path beside the file of the function, which is not train.py.
            composing = progress.phase("composing the configuration", until=self._has_composed)
            unheard = flags.shell_completion  # a half-typed command has no completions, and no message
            quiet = contextlib.redirect_stderr(io.StringIO()) if unheard else contextlib.nullcontext()
            with quiet, composing, reported(self.sweep):
                hydra.main(version_base=None, config_path=str(CONF), config_name=self.root)(self.job)()
            if self.failure is not None:
                raise self.failure
            if failed := self.sweep.failure():
                raise failed
        except BaseException as error:
            if verbose:
                traceback.print_exc()
            if isinstance(error, Exception | SystemExit) and "COMP_LINE" in os.environ and "-sc" in argv:
                return DONE
            error = self.sweep.refused or error
            if isinstance(error, Exception) and (failed := self.sweep.failure()):
                error = failed  # Hydra and its sweepers raise the first failure, or an error of their own
            if isinstance(error, Exception) and not self.composed:
                error = self._as_mistake(error, argv)
            if isinstance(error, KeyboardInterrupt) and (words := self._last_words()):
                print(words, file=sys.stderr)
            return report(error, argv, self.root)
        return _flushed()

    def _last_words(self) -> str:
        """Return what a command says that is stopped now."""
        if self.sweep.arguments or not is_first_on_node():  # a sweep has words of its own
            return ""
        return NOTHING_SAVED if self.untouched else "stopped"

    def _is_sweep(self) -> bool:
        """Return True once the directory of a sweep has been chosen."""
        return self.sweep.directory is not None

    def _as_mistake(self, error: Exception, argv: list[str]) -> Exception:
        """Return an error from before any job as the user's mistake, unless it is an error of dsv3's code.

        Hydra, OmegaConf and YAML crash in many ways on what a user may type or write into a file.
        """
        if isinstance(error, UserError | RunFailed | HydraException | OmegaConfBaseException):
            return error
        if isinstance(error, OSError) and (directory := self.sweep.directory) is not None:
            return UserError(f"run.dir={directory} cannot be made: {error.strerror}; name another")
        if isinstance(error, OSError) and error.filename is None:  # stdout on a full disk
            return RunFailed(f"stdout cannot be written: {error.strerror}")
        if isinstance(error, OSError | yaml.YAMLError | UnicodeDecodeError):
            return UserError(explain_error(error, argv, {}, user_files(argv)))
        if refusal := _plugin_refusal(error, argv, self.sweep):
            return refusal
        *_, last = traceback.extract_tb(error.__traceback__)
        composing = {"hydra", "omegaconf", "antlr4", "yaml", "argparse.py"} & set(Path(last.filename).parts)
        return ConfigCompositionException(str(error) or type(error).__name__) if composing else error

    def _has_composed(self) -> bool:
        """Return True once a job has been composed, or the sweep of jobs in other processes."""
        return self.composed or self._is_sweep()

    def job(self, config: DictConfig) -> float | None:
        """Execute one composed config, alone or as a job of a sweep."""
        self.composed = True
        runtime = HydraConfig.get()
        task: Any = OmegaConf.get_type(config, "task") if "task" in config else None
        if runtime.mode is RunMode.MULTIRUN:
            directory = Path(runtime.runtime.output_dir)
            place = self.sweep.job(runtime.job.num, job_overrides(), runtime.sweeper, directory)
            parallel = in_parallel_job()
            with prefix_lines(f"[{place.number}] ") if parallel else contextlib.nullcontext():
                return self._job_of_sweep(config, task, runtime, place, directory)
        self.untouched = getattr(task, "writes_run", False)
        try:
            result = self.execute(config)
            self.ended = True
            return result
        except Exception as error:
            self.failure = error  # Hydra reports an exception in its own words: hand it to run() instead
            return None

    def _job_of_sweep(
        self, config: DictConfig, task: Any, runtime: Any, place: SweepJob, directory: Path
    ) -> float | None:
        """Announce and execute a job; report a failure at once, and leave its result in its directory."""
        trains = getattr(task, "writes_run", False)
        apart = "" if in_parallel_job() else "\n"
        print(apart + place.heading, file=sys.stdout if trains else sys.stderr, flush=True)
        described = describe_job(config, runtime.runtime.choices, job_overrides(), place)
        try:
            result = self.execute(config, place)
            if _searches(runtime.sweeper) and (result is None or not math.isfinite(result)):
                raise RunFailed(f"its result is {result}, not a held-out loss that the sweeper could compare")
            if not trains and (result is not None or getattr(task, "reads_rows", False)):
                record_result(directory, {**described, "loss": result})
            return result
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"job {place.number} failed: {reason}", file=sys.stderr, flush=True)
            mark_failed(directory, reason, job_overrides(), described)
            if _searches(runtime.sweeper) and runtime.sweeper.get("max_failure_rate") != 1:
                raise RunFailed(f"job {place.number} failed") from None
            return None  # the failure mark reports it; for an exception Hydra prints a line of its own


def _plugin_refusal(error: Exception, argv: Sequence[str], sweep: Sweep) -> UserError | None:
    """Return what a launcher or sweeper of Hydra's has raised before it had begun a job, as a mistake."""
    paths = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    own = max((n for n, path in enumerate(paths) if path.is_relative_to(ROOT / "dsv3")), default=-1)
    parts = [part for path in paths[own + 1 :] for part in path.parts]
    kinds = [kind for kind in ("launcher", "sweeper") if any(part.endswith(f"_{kind}") for part in parts)]
    begun = sweep.directory is not None and any(
        entry.is_dir() and not entry.name.startswith(".") for entry in sweep.directory.glob("*")
    )
    if not kinds or "hydra_plugins" not in parts or begun:
        return None
    kind = kinds[0]
    if sweep.directory is not None:
        (sweep.directory / "multirun.yaml").unlink(missing_ok=True)  # Hydra's
        shutil.rmtree(sweep.directory / ".submitit", ignore_errors=True)
        with contextlib.suppress(OSError):  # there are files of other commands in it
            sweep.directory.rmdir()
            if sweep.directory.parent.name == "multirun":
                sweep.directory.parent.rmdir()
    choice = next((each for each in argv if each.startswith(f"hydra/{kind}=")), f"the {kind}")
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"{choice} cannot start the jobs: {reason} (hydra.{kind}.KEY=VALUE are its settings)")


def _searches(sweeper: Any) -> bool:
    """Return True for a sweeper that judges jobs by their results, and so must be told that one has none."""
    return not sweeper._target_.endswith("BasicSweeper")


def register_resolvers(sweep: Sweep) -> None:
    """Register `sweep_dir` and `job_number`: the directory of a sweep, and that of a job below it."""
    OmegaConf.register_new_resolver("sweep_dir", sweep.choose, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("job_number", sweep.number, replace=True)


def user_files(argv: Sequence[str]) -> UserFiles:
    """Return the user's YAML files of a command, of one whose flags are wrong too."""
    try:
        return UserFiles(argv, user_config_dir(argv))
    except (UserError, OSError):
        return UserFiles(argv, None)


def _flushed() -> int:
    """Return DONE once everything that was printed is out; FAILED where it cannot be, as on a full disk."""
    try:
        sys.stdout.flush()
    except OSError as error:
        discard(sys.stdout)
        return report(RunFailed(f"stdout cannot be written: {error.strerror}"), [])
    return DONE


def report(error: BaseException, argv: Sequence[str], root: str = "config") -> int:
    """Print what went wrong, in one or two lines where the user can fix it, and return the exit code.

    A mistake that all ranks of torchrun or srun meet is printed once per node.
    """
    if isinstance(error, Stopped):
        if error.message and os.environ.get("RANK", "0") == "0":  # under torchrun all ranks stop as one
            print(error.message, file=sys.stderr)
        return int(error.code or 0)
    if isinstance(error, KeyboardInterrupt):
        return KILLED
    error = refused_by_system(error) or error
    if isinstance(error, UserError | HydraException | OmegaConfBaseException):
        if is_first_on_node():
            files = user_files(argv)
            if isinstance(error, UserError):
                text = (files.place(error.key) if isinstance(error, InvalidValue) else "") + str(error)
            else:
                text = explain_error(error, argv, root_groups(root, files), files)
            print("\n".join(map(_shortened, f"error: {text}".splitlines())), file=sys.stderr)
        else:
            # torchrun ends all ranks as soon as one is gone: let the node's first rank report first.
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(PATIENCE)
        return MISTAKE
    if isinstance(error, RunFailed):
        print(f"failed: {error}", file=sys.stderr)
        return FAILED
    if isinstance(error, SystemExit):  # Hydra's, which has said why
        return MISTAKE if error.code else DONE
    traceback.print_exception(error)
    return FAILED


def _shortened(line: str) -> str:
    """Return a line of a message without the middle of what was typed by the kilobyte."""
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
