"""Searches by hydra/sweeper=optuna: their study is kept beside the jobs, and goes on after a kill.

The plugin asks for all of its trials anew whenever it is started, keeps the study in memory, and ends with
the first trial that fails. Before it starts, it is given a file for the study, the trials that are left, and
the number of the first job: the directory of a job has the number of its trial. A search none of whose jobs
can have a result to compare is refused as a whole.
"""

import contextlib
import logging
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dsv3.config.overrides import compose as compose_root
from dsv3.config.overrides import override_key, quote
from dsv3.config.registry import CONF, register
from dsv3.errors import UserError
from dsv3.launch.sweep import Sweep, number_of_choices, searched_arguments, split_arguments

STUDY_FILE, STUDY_NAME = "study.db", "sweep"


def continue_search(arguments: Sequence[str], sweep: Sweep, own: Path | None = None) -> list[str] | None:
    """Return the overrides that let an optuna search start, or go on where it stopped.

    They are none for other sweepers. Returns None where all trials are done. `own` is a user's config folder.
    """
    if not {"hydra/sweeper", "experiments"} & set(map(override_key, arguments)):
        return []
    settings, run_dir = _settings(arguments, own)
    _require_objective(arguments, settings, own)
    if not str(settings["_target_"]).endswith(".OptunaSweeper"):
        return []
    for key in ("n_trials", "n_jobs"):
        count = settings[key]
        if count is not None and (not isinstance(count, int) or count < 1):
            raise UserError(f"hydra.sweeper.{key}={count} is not possible: must be a whole number above 0")
    _quieten()
    typed = {override_key(argument) for argument in arguments}
    added: dict[str, Any] = {}
    if "hydra.sweeper.max_failure_rate" not in typed and not settings["max_failure_rate"]:
        added["max_failure_rate"] = 1.0
    if "hydra.sweeper.n_jobs" not in typed and not {"hydra/launcher"} & typed:
        added["n_jobs"] = 1  # jobs run in turn: a batch of several would be told to the study at its end only
    storage, name = settings["storage"], settings["study_name"]
    directory = Path(sweep.choose(run_dir)).absolute()
    beside = storage is None and "?" not in str(directory)  # a `?` would begin the options of the address
    if beside:
        storage, name = f"sqlite:///{directory / STUDY_FILE}", name or STUDY_NAME
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run.dir={directory} cannot be made: {error.strerror}") from None
        added |= {"storage": quote(storage), "study_name": quote(name)}
        if not (directory / STUDY_FILE).exists():
            _tell(f"the study is kept in {directory / STUDY_FILE}: the same command goes on with it")
    if storage is not None and name is not None and (not beside or (directory / STUDY_FILE).exists()):
        study = _load_study(str(storage), str(name))
        if study is not None:
            if beside:
                _tell_finished(study, directory)
            total = _trials(settings, arguments)
            sweep.finished = sum(trial.state.is_finished() for trial in study.trials)
            sweep.first = len(study.trials)
            left = added["n_trials"] = max(0, total - sweep.finished)
            lost = sweep.first - sweep.finished
            broken = f", {lost} broken off and not counted" if lost else ""
            _tell(f"the study in {storage} has {sweep.finished} of {total} trials{broken}: {left} to go")
            if not left:
                return None
    return [f"hydra.sweeper.{key}={value}" for key, value in added.items()]


def why_no_objective(config: Any, swept: Collection[str] = ()) -> str | None:
    """Return why a run has no result that a search could compare; None where it has, or may have.

    `config` is complete, or as composed. `swept` are the keys of which it says nothing.
    """

    def settled(*keys: str) -> bool:
        return not {*keys, "experiments", "task", "train"} & set(swept)

    train, task = config.train, _schema(config, "task")
    if settled() and not task.has_result:
        return (
            "this task returns no number for the sweeper to compare: search with task=train or task=evaluate"
        )
    if settled("launch") and task.uses_model and _schema(config, "launch").submits:
        way = "hydra/launcher=submitit_slurm, which waits for its jobs"
        return f"launch=slurm returns before a job has a result for the sweeper to compare: take {way}"
    if not task.writes_run:
        return None
    every, last = train.evaluate_every, train.stop_after or train.steps
    if settled("train.evaluate_every") and every == 0:
        once = f", as train.evaluate_every={train.steps} for one at the end" if settled("train.steps") else ""
        return (
            "train.evaluate_every=0 measures no held-out loss, which the sweeper compares: "
            f"give it the steps between two{once}"
        )
    cut = last < train.steps and bool(every) and last % every != 0
    if cut and settled("train.evaluate_every", "train.steps", "train.stop_after"):
        return (
            f"train.stop_after={last} ends a run without a held-out loss, which the sweeper compares: "
            f"make it a multiple of train.evaluate_every={every}, or lower train.steps instead"
        )
    return None


def _schema(config: Any, node: str) -> Any:
    """Return the schema of a node of a config, complete or as composed."""
    return OmegaConf.get_type(config, node) if OmegaConf.is_config(config) else type(getattr(config, node))


def _require_objective(arguments: Sequence[str], settings: Mapping[str, Any], own: Path | None) -> None:
    """Raise UserError for a search whose jobs all lack a result, whatever is swept."""
    if str(settings["_target_"]).endswith("BasicSweeper"):
        return
    typed = [argument for argument in arguments if not argument.startswith(("-", "hydra", "+hydra", "run."))]
    swept, constant = split_arguments([*searched_arguments(settings), *typed])
    try:
        config = compose_root(
            [argument for argument in typed if override_key(argument).lstrip("+~") in constant],
            [] if own is None else [f"file://{own}"],
        )
        why = why_no_objective(config, swept)
    except (HydraException, OmegaConfBaseException, AttributeError, ValueError):
        return  # the jobs say what is wrong
    if why is not None:
        raise UserError(why)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _quieten() -> None:
    """Keep the plugin and optuna from logging what the sweep says in its own words."""
    logging.getLogger("hydra_plugins.hydra_optuna_sweeper").setLevel(logging.ERROR)
    with contextlib.suppress(ImportError):
        import optuna

        optuna.logging.set_verbosity(logging.ERROR)


def _settings(arguments: Sequence[str], own: Path | None) -> tuple[Mapping[str, Any], str | None]:
    """Return Hydra's sweeper as it will be composed, and run.dir."""
    fixed = [a for a in arguments if a.startswith(("hydra/", "hydra.", "+hydra", "run.dir=", "experiments="))]
    swept, _ = split_arguments(fixed)
    search = [] if own is None else [f"hydra.searchpath=[{quote(f'file://{own}')}]"]
    kept = [argument for argument in fixed if override_key(argument) not in swept]
    GlobalHydra.instance().clear()
    register()
    with initialize_config_dir(str(CONF), version_base=None):
        config = compose("config", [*kept, *search], return_hydra_config=True)
    sweeper: Any = OmegaConf.to_container(config.hydra.sweeper)
    return sweeper, config.run.dir


def _trials(settings: Mapping[str, Any], arguments: Sequence[str]) -> int:
    """Return the trials that were asked for; a grid has no more than its points."""
    wanted = int(settings["n_trials"])
    if not str(settings["sampler"]["_target_"]).endswith("GridSampler"):
        return wanted
    swept, _ = split_arguments([*searched_arguments(settings), *arguments])
    return min(wanted, math.prod(number_of_choices(override) or 1 for override in swept.values()))


def _load_study(storage: str, name: str) -> Any:
    """Return the study, None where there is none yet; the plugin tells of a storage that cannot be opened."""
    try:
        import optuna

        return optuna.load_study(study_name=name, storage=storage)
    except Exception:
        return None


def _tell_finished(study: Any, directory: Path) -> None:
    """Tell the study the results of jobs that ended in a batch that was broken off before its end."""
    from dsv3.launch.run_results import State, read_run

    for trial in study.trials:
        run = read_run(directory / str(trial.number), str(trial.number))
        if not trial.state.is_finished() and run.state is State.done and run.held_out is not None:
            study.tell(trial.number, run.held_out)
