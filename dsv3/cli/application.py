"""A command from its arguments to its exit code: prepare, compose, check, plan, launch."""

import contextlib
import importlib
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dsv3.cli.arguments import flags_first, import_user_modules, user_config_dir
from dsv3.cli.error_messages import explain_error
from dsv3.config.overrides import is_multirun
from dsv3.config.registry import CONF, ROOT, command, config_groups, register
from dsv3.distributed.signals import Stopped
from dsv3.errors import DONE, FAILED, KILLED, MISTAKE, RunFailed, UserError
from dsv3.launch.job import is_first_on_node
from dsv3.launch.slurm import srun_variables
from dsv3.launch.sweep import Sweep, die_with_sweep, mark_failed, share_source_with_jobs

# Seconds that the other ranks of a node wait for the first one to report a mistake.
PATIENCE = 3.0


class Application:
    """One program: composes its config with Hydra and executes every job.

    `program` is train or convert, and `root` its file in conf/. `prepare` turns the user's arguments into
    Hydra's, `execute` runs a composed config.
    """

    def __init__(
        self,
        program: str,
        root: str,
        help_text: Callable[[str, Sequence[str]], str],
        prepare: Callable[[Sequence[str]], list[str]],
        execute: Callable[[DictConfig], float | None],
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
        self.failure: BaseException | None = None
        self.sweep = Sweep()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin in the process of a sweep's job, which joblib or submitit has started elsewhere."""
        self.__dict__.update(state)
        os.environ.update(srun_variables(os.environ))
        for module in self.user_modules:
            importlib.import_module(module)
        register_resolvers(self.sweep)
        die_with_sweep()

    def run(self, argv: list[str]) -> int:
        """Execute the command and return the exit code of the contract."""
        if {"-h", "--help"} & set(argv):
            try:
                import_user_modules(argv)
                print(self.help_text(" ".join(command(self.program)), argv), flush=True)
            except (UserError, HydraException, OmegaConfBaseException) as error:
                return report(error, argv)
            except BrokenPipeError:  # `--help | head` has read enough; stdout is flushed once more at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return DONE
        verbose = "HYDRA_FULL_ERROR" in os.environ
        os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra would print errors itself and exit with 1
        os.environ.update(srun_variables(os.environ))
        register_resolvers(self.sweep)
        # Until training handles signals there is nothing to save: SIGTERM ends the command as Ctrl-C does.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            self.user_modules = import_user_modules(argv)
            user_config_dir(argv)
            register()
            sys.argv = [f"{self.program}.py", *flags_first(self.prepare(argv))]
            if is_multirun(argv):
                share_source_with_jobs(ROOT)
            # Hydra looks for a relative config_path beside the file of the function, which is not train.py.
            hydra.main(version_base=None, config_path=str(CONF), config_name=self.root)(self.job)()
            if self.failure is not None:
                raise self.failure
            if failed := self.sweep.failure():
                raise failed
        except BaseException as error:
            if verbose:
                traceback.print_exc()
            if isinstance(error, Exception) and (failed := self.sweep.failure()):
                error = failed  # Hydra and its sweepers raise the first failure, or an error of their own
            of_omegaconf = isinstance(error, AttributeError) and "full_key: " in str(error)
            if (of_omegaconf or isinstance(error, AssertionError | ValueError)) and not self.composed:
                # Hydra crashed on an override while it composed: no job of ours has begun.
                error = ConfigCompositionException(str(error))
            if isinstance(error, KeyboardInterrupt) and self.untouched and is_first_on_node():
                print("stopped before the first step; nothing was saved", file=sys.stderr)
            return report(error, argv)
        finally:
            signal.signal(signal.SIGTERM, before)
        return DONE

    def job(self, config: DictConfig) -> float | None:
        """Execute one composed config; in a sweep report a failure at once and mark its directory."""
        self.composed = True
        runtime = HydraConfig.get()
        task: Any = OmegaConf.get_type(config, "task") if "task" in config else None
        self.untouched = runtime.mode is RunMode.RUN and getattr(task, "writes_run", False)
        try:
            result = self.execute(config)
            searches = runtime.mode is RunMode.MULTIRUN and _searches(runtime.sweeper)
            if searches and (result is None or not math.isfinite(result)):
                raise RunFailed(f"its result is {result}, not a held-out loss that the sweeper could compare")
            return result
        except Exception as error:
            if runtime.mode is RunMode.MULTIRUN:
                reason = " ".join(str(error).split()) or type(error).__name__
                print(f"job {runtime.job.num} failed: {reason}", file=sys.stderr, flush=True)
                mark_failed(Path(runtime.runtime.output_dir), reason, list(runtime.overrides.task))
                if _searches(runtime.sweeper):
                    raise RunFailed(f"job {runtime.job.num} failed") from None
                return None  # the failure mark reports it; for an exception Hydra prints a line of its own
            # Hydra reports an exception in its own words: hand it to run() instead.
            self.failure = error
            return None


def _searches(sweeper: Any) -> bool:
    """Return True for a sweeper that judges jobs by their results, and so must be told that one has none."""
    return not sweeper._target_.endswith("BasicSweeper")


def register_resolvers(sweep: Sweep) -> None:
    """Register `sweep_dir`: a sweep's directory where run.dir names none, the same for the whole sweep."""
    OmegaConf.register_new_resolver("sweep_dir", sweep.choose, use_cache=True, replace=True)


def report(error: BaseException, argv: list[str]) -> int:
    """Print what went wrong, in one or two lines where the user can fix it, and return the exit code.

    A mistake that all ranks of torchrun or srun meet is printed once per node.
    """
    if isinstance(error, Stopped):
        if error.message and os.environ.get("RANK", "0") == "0":  # under torchrun all ranks stop as one
            print(error.message, file=sys.stderr)
        return int(error.code or 0)
    if isinstance(error, KeyboardInterrupt):
        return KILLED
    if isinstance(error, UserError | HydraException | OmegaConfBaseException):
        if is_first_on_node():
            known = isinstance(error, UserError)
            print(
                f"error: {error if known else explain_error(error, argv, config_groups())}", file=sys.stderr
            )
        else:
            # torchrun ends all ranks as soon as one is gone: let the node's first rank report first.
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(PATIENCE)
        return MISTAKE
    if isinstance(error, RunFailed):
        print(f"failed: {error}", file=sys.stderr)
        return FAILED
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else FAILED
    traceback.print_exception(error)
    return FAILED
