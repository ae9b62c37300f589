"""Say what the schedule does over the steps to come, before a run starts, where that may not be expected.

Two things are refused. A warm-up that is typed must be shorter than the schedule; one that comes from a file
or a recipe is shortened and told. A run must not train at a learning rate of 0 past the end of its schedule,
unless optimizer.lr itself is 0. Zeros within the schedule are the schedule's own, and told.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dsv3.config.convergence import flatten
from dsv3.config.overrides import split_override
from dsv3.config.root import Config
from dsv3.config.strict import to_yaml
from dsv3.errors import UserError
from dsv3.training.schedule import Schedule, StepHyperparameters, build_schedule

_SAMPLES = 1000
"""Steps that are looked at, of all that come."""

_WARMUP = "schedule.warmup_steps"

_TOTAL = "schedule.total_steps"


def fit_warmup(config: Config, typed: Sequence[str], resumed: bool) -> tuple[Config, list[str]]:
    """Return the config with a warm-up that is shorter than the schedule, and a line where it was not.

    UserError where the warm-up, or in a resumed run the schedule's end, was typed so.
    """
    schedule = config.schedule
    warmup, total = schedule.warmup_steps, schedule.total_steps or config.train.steps
    if warmup < total or warmup == 0:
        return config, []
    pairs = [pair for pair in map(split_override, typed) if pair]
    named = {key for key, _ in pairs} | {
        f"{key}.warmup_steps" for key, value in pairs if "warmup_steps" in value
    }
    if _WARMUP in named or (resumed and _TOTAL in named):
        fewer = f"use {_WARMUP}={total - 1} or less"
        raise UserError(
            f"{_WARMUP}={warmup} is not shorter than the schedule, which has {total} steps: {fewer}, "
            f"or a longer schedule, {_TOTAL}={warmup + 1} or more"
        )
    if resumed:
        return config, [f"the warm-up is longer than the schedule: {_WARMUP}={warmup}, {_TOTAL}={total}"]
    short = total // 10
    note = (
        f"{_WARMUP} {warmup} -> {short}, a tenth of the schedule, which has {total} steps only; "
        f"{_WARMUP}=N sets it"
    )
    return replace(config, schedule=replace(schedule, warmup_steps=short)), [note]


def schedule_notes(config: Config, done: int = 0, stored: Mapping[str, Any] | None = None) -> list[str]:
    """Return lines on what is unusual in the steps after `done`.

    `config` is completed; `stored` are the values of a resumed run by dotted keys.

    Raises:
        UserError: the learning rate is 0 in steps past the end of the schedule.
    """
    train, steps = config.train, config.train.steps
    first, last = done + 1, min(steps, train.stop_after or steps)
    notes = []
    if train.stop_after is not None and train.stop_after > steps:
        notes.append(
            f"train.stop_after={train.stop_after} lies beyond train.steps={steps}, where the run ends"
        )
    if first > last:
        longer = "train.steps" if last == steps else "train.stop_after"
        return [*notes, f"nothing is left to train: step {done} is done; {longer}=N goes on to step N"]
    return [*notes, *_changes(config, first, stored or {}), *_rest(config, first, last)]


def _rest(config: Config, first: int, last: int) -> list[str]:
    """Return lines on the steps `first` to `last`; UserError as of schedule_notes."""
    schedule, steps, notes = _schedule(config), config.train.steps, []
    warmup, total = config.schedule.warmup_steps, schedule.total_steps
    if config.optimizer.lr == 0:
        notes.append("the learning rate is 0, as optimizer.lr=0 says: nothing is learnt")
    elif past := _zeros(schedule, max(first, total + 1), last):
        final = "schedule.final=0.1 keeps a tenth of it, " if hasattr(config.schedule, "final") else ""
        raise UserError(
            f"the learning rate is 0 from step {past} to {last}: the schedule has ended, {_TOTAL}={total}. "
            f"{_TOTAL}={steps} stretches it over all steps, {final}optimizer.lr=0 trains at 0"
        )
    elif zero := _zeros(schedule, first, min(last, total - 1)):
        notes.append(f"the schedule has a learning rate of 0 from step {zero} on")
    if last > total:
        stay = ", ".join(f"{name} {value:.3g}" for name, value in _values(config, last).items())
        notes.append(
            f"the schedule has ended at step {total}: steps {max(first, total + 1)} to {last} have {stay}; "
            f"{_TOTAL}={steps} stretches it"
        )
    elif warmup >= last:
        notes.append(
            f"the run ends within the warm-up of {warmup} steps, at a rate of {_rate(config, last):.3g}"
        )
    elif steps < total:
        ends, would = _rate(config, steps), _rate(config, total)
        notes.append(
            f"the run ends at step {steps} of a schedule of {total} steps: the learning rate is {ends:.3g} "
            f"there, and would be {would:.3g} at the end"
        )
    if first <= warmup < last and total / 2 < warmup < total:
        notes.append(f"the warm-up takes {warmup} of the {total} steps of the schedule")
    return notes


def _changes(config: Config, first: int, stored: Mapping[str, Any]) -> list[str]:
    """Return lines on what a resume makes of the schedule from step `first` on."""
    notes = []
    before, total = stored.get(_TOTAL), config.schedule.total_steps
    if type(before) is int and before != total:
        old = _values(replace(config, schedule=replace(config.schedule, total_steps=before)), first)
        new = _values(config, first)
        told = [
            f"{name} {new[name]:.3g} instead of {old[name]:.3g}" for name in old if new[name] != old[name]
        ]
        verb = "stretches" if total is not None and total > before else "shortens"
        effect = f": step {first} has {', '.join(told)}" if told else ""
        notes.append(f"{verb} the schedule from {before} to {total} steps{effect}")
    before, now = stored.get("train.global_batch_size"), config.train.batch
    ramps = [_told_ramp(stored), _told_ramp(flatten(to_yaml(config)))]
    if type(before) is int and (before, ramps[0]) != (now, ramps[1]):
        batch = f"{now} sequences instead of {before}"
        if ramps[0] != ramps[1]:
            batch = f"{now} sequences{ramps[1]} instead of {before}{ramps[0]}"
        notes.append(f"from step {first} on a step has {batch}; the learning rate per step stays as it is")
    return notes


def _told_ramp(values: Mapping[str, Any]) -> str:
    """Return what the ramp of a config's values does to the batch; runs of older code have none."""
    start, increment, tokens = (
        values.get(f"train.batch_ramp.{key}") for key in ("start", "increment", "tokens")
    )
    if start is None:
        return " without a ramp"
    return f" ramped up from {start} by {increment} over the run's first {tokens} tokens"


def _schedule(config: Config) -> Schedule:
    return build_schedule(config)


def _rate(config: Config, step: int) -> float:
    return config.optimizer.lr * _schedule(config)(step)


def _values(config: Config, step: int) -> dict[str, float]:
    """Return what the schedule decides in `step`, as far as the model has it, by its name in a sentence."""
    schedule = _schedule(config)
    at = StepHyperparameters.at(schedule.share(step), _rate(config, step), config.train)
    values = {"a learning rate of": at.lr}
    if config.model.moe.selection_bias:
        values["an expert bias speed of"] = at.bias_speed
    if config.model.mtp_depths:
        values["an MTP weight of"] = at.mtp_weight
    return values


def _zeros(schedule: Schedule, first: int, last: int) -> int | None:
    """Return the first step from `first` to `last`, of those looked at, whose learning rate is 0."""
    stride = max(1, (last - first) // _SAMPLES)
    steps = [*range(first, last + 1, stride), last] if first <= last else []
    return next((step for step in steps if schedule(step) == 0), None)
