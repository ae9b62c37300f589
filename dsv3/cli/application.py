"""A command from its arguments to its exit code: prepare, compose, check, plan, launch."""

import contextlib
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dsv3.cli.arguments import flags_first
from dsv3.cli.error_messages import explain
from dsv3.cli.help import config_groups
from dsv3.config.overrides import is_multirun
from dsv3.config.root import CONF, register
from dsv3.distributed.signals import KILLED, Stopped
from dsv3.errors import RunFailed, UserError
from dsv3.launch.job import is_first_here
from dsv3.launch.slurm import srun_variables
from dsv3.launch.sweep import Sweep, end_with_sweep, mark_failed, same_code

DONE, FAILED, MISTAKE = 0, 1, 2

# What a silent rank waits for the one that speaks, in seconds.
PATIENCE = 3.0

T = TypeVar("T")


class Application:
    """Runs one command; `job` is what its @hydra.main function calls for every job.

    `carry_out` does what a composed config says, `prepare` makes Hydra's arguments of the user's.
    """

    def __init__(
        self,
        program: str,
        help_text: Callable[[str], str],
        prepare: Callable[[Sequence[str]], list[str]],
        carry_out: Callable[[DictConfig], float | None],
    ) -> None:
        self.program = program
        self.help_text = help_text
        self.prepare = prepare
        self.carry_out = carry_out
        self.composed = False
        self.untouched = True
        """Whether a stop now would leave nothing behind: no training has taken over the signals."""
        self.failure: BaseException | None = None
        self.sweep = Sweep()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin in the process of a sweep's job, which joblib or submitit has started elsewhere."""
        self.__dict__.update(state)
        os.environ.update(srun_variables(os.environ))
        register_resolvers(self.sweep)
        end_with_sweep()

    def run(self, main: Callable[[], T], argv: list[str]) -> int:
        """Carry out the command; the exit code of the contract."""
        if {"-h", "--help"} & set(argv):
            print(self.help_text(self.program))
            return DONE
        verbose = "HYDRA_FULL_ERROR" in os.environ
        os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra would print errors itself and exit with 1
        os.environ.update(srun_variables(os.environ))
        register()
        register_resolvers(self.sweep)
        # Before training listens itself there is nothing to save: a stop ends the command as Ctrl-C does.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            arguments = flags_first(self.prepare(argv))
            sys.argv = [self.program, *arguments]
            if is_multirun(argv):
                same_code(CONF.parent)
            main()
            if self.failure is not None:
                raise self.failure
            if failed := self.sweep.failure():
                raise failed
        except BaseException as error:
            if verbose:
                traceback.print_exc()
            if isinstance(error, Exception) and (failed := self.sweep.failure()):
                error = failed  # Hydra and its sweepers raise the first, or what they made of it
            stumbled = isinstance(error, AttributeError) and "full_key: " in str(error)  # OmegaConf's own
            if (stumbled or isinstance(error, AssertionError | ValueError)) and not self.composed:
                # Overrides that Hydra stumbles over while it composes: no job of ours has begun.
                error = ConfigCompositionException(str(error))
            if isinstance(error, KeyboardInterrupt) and self.untouched and is_first_here():
                print("stopped before the first step; nothing was saved", file=sys.stderr)
            return report(error, argv)
        finally:
            signal.signal(signal.SIGTERM, before)
        return DONE

    def job(self, config: DictConfig) -> float | None:
        """Carry out one composed config; in a sweep a failure is told at once and marked."""
        self.composed = True
        hydra = HydraConfig.get()
        task: Any = OmegaConf.get_type(config, "task") if "task" in config else None
        self.untouched = hydra.mode is RunMode.RUN and getattr(task, "writes_run", False)
        try:
            result = self.carry_out(config)
            if hydra.mode is RunMode.MULTIRUN and _searches(hydra.sweeper):
                _require_objective(result)
            return result
        except Exception as error:
            if hydra.mode is RunMode.MULTIRUN:
                reason = _one_line(error)
                print(f"job {hydra.job.num} failed: {reason}", file=sys.stderr, flush=True)
                mark_failed(Path(hydra.runtime.output_dir), reason, list(hydra.overrides.task))
                if _searches(hydra.sweeper):
                    raise RunFailed(f"job {hydra.job.num} failed") from None
                return None  # the mark says it: of an exception Hydra would print a line of its own
            # Hydra would announce an exception in words of its own: hand it to run() instead.
            self.failure = error
            return None


def _searches(sweeper: Any) -> bool:
    """Whether a sweeper judges jobs by their results, and so must be told that one has none."""
    return not sweeper._target_.endswith("BasicSweeper")


def _require_objective(result: float | None) -> None:
    """RunFailed where a sweeper that searches gets nothing to judge the job by."""
    if result is None or not math.isfinite(result):
        raise RunFailed(f"its result is {result}, not a held-out loss that the sweeper could compare")


def register_resolvers(sweep: Sweep) -> None:
    """`sweep_dir`: where a sweep's jobs go unless run.dir says so; one answer for the whole sweep."""
    OmegaConf.register_new_resolver("sweep_dir", sweep.choose, use_cache=True, replace=True)


def report(error: BaseException, argv: list[str]) -> int:
    """Tell the user what went wrong, in one or two lines where it is theirs to mend; the exit code.

    A mistake that all ranks of torchrun or srun meet is told once a node.
    """
    if isinstance(error, Stopped):
        if error.message and os.environ.get("RANK", "0") == "0":  # under torchrun all ranks stop as one
            print(error.message, file=sys.stderr)
        return int(error.code or 0)
    if isinstance(error, KeyboardInterrupt):
        return KILLED
    if isinstance(error, UserError | HydraException | OmegaConfBaseException):
        if is_first_here():
            known = isinstance(error, UserError)
            print(f"error: {error if known else explain(error, argv, config_groups())}", file=sys.stderr)
        else:
            _wait_for_first()
        return MISTAKE
    if isinstance(error, RunFailed):
        print(f"failed: {error}", file=sys.stderr)
        return FAILED
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else FAILED
    traceback.print_exception(error)
    return FAILED


def _wait_for_first() -> None:
    """Let the node's first rank say what is wrong: torchrun ends all ranks as soon as one is gone."""
    with contextlib.suppress(KeyboardInterrupt):
        time.sleep(PATIENCE)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
