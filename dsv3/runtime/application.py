"""A command from its arguments to its exit code: prepare, compose, check, plan, launch."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dsv3.config import register
from dsv3.runtime.commandline import flags_first
from dsv3.runtime.errors import RunFailed, UserError
from dsv3.runtime.explain import explain
from dsv3.runtime.groups import config_groups
from dsv3.runtime.signals import KILLED, Stopped

DONE, FAILED, MISTAKE = 0, 1, 2
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
        self.failure: BaseException | None = None
        self.failed: list[str] = []

    def run(self, main: Callable[[], T], argv: list[str]) -> int:
        """Carry out the command; the exit code of the contract."""
        if {"-h", "--help"} & set(argv):
            print(self.help_text(self.program))
            return DONE
        verbose = "HYDRA_FULL_ERROR" in os.environ
        os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra would print errors itself and exit with 1
        register()
        register_resolvers()
        # Before training listens itself there is nothing to save: a stop ends the command as Ctrl-C does.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            arguments = flags_first(self.prepare(argv))
            sys.argv = [self.program, *arguments]
            main()
            if self.failure is not None:
                raise self.failure
        except BaseException as error:
            if verbose:
                traceback.print_exc()
            if isinstance(error, AssertionError | ValueError) and not self.composed:
                # Overrides that Hydra stumbles over while it composes: no job of ours has begun.
                error = ConfigCompositionException(str(error))
            return report(error, argv)
        finally:
            signal.signal(signal.SIGTERM, before)
        return DONE

    def job(self, config: DictConfig) -> float | None:
        """Carry out one composed config; in a sweep a failure is told and raised at once."""
        self.composed = True
        try:
            return self.carry_out(config)
        except Exception as error:
            if HydraConfig.get().mode is RunMode.MULTIRUN:
                number = HydraConfig.get().job.num
                print(f"job {number} failed: {_one_line(error)}", file=sys.stderr, flush=True)
                self.failed.append(str(number))
                jobs = "job" if len(self.failed) == 1 else "jobs"
                raise RunFailed(f"{jobs} {', '.join(self.failed)} failed; the others went on") from error
            # Hydra would announce an exception in words of its own: hand it to run() instead.
            self.failure = error
            return None


def register_resolvers() -> None:
    """`sweep_dir`: where a sweep's jobs go unless run.dir says so; one answer for the whole sweep."""
    OmegaConf.register_new_resolver(
        "sweep_dir",
        lambda chosen: chosen or f"multirun/{time.strftime('%Y-%m-%d_%H-%M-%S')}",
        use_cache=True,
        replace=True,
    )


def report(error: BaseException, argv: list[str]) -> int:
    """Tell the user what went wrong, in one or two lines where it is theirs to mend; the exit code."""
    if isinstance(error, Stopped):
        if error.message:
            print(error.message, file=sys.stderr)
        return int(error.code or 0)
    if isinstance(error, KeyboardInterrupt):
        return KILLED
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    if isinstance(error, RunFailed):
        print(f"failed: {error}", file=sys.stderr)
        return FAILED
    if isinstance(error, HydraException | OmegaConfBaseException):
        print(f"error: {explain(error, argv, config_groups())}", file=sys.stderr)
        return MISTAKE
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else FAILED
    traceback.print_exception(error)
    return FAILED


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
