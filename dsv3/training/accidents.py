"""Watch the rows of a run: tell of skipped steps, end a run that has too many, and see a loss that diverges.

Every rank reads the same rows in the same order, so all of them come to the same decisions without asking one
another. Ranks exchange names only after a bad step. docs/reliability.md ("Bad numbers") says what a user
sees.
"""

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from dsv3.checkpoint.directory import Progress
from dsv3.checkpoint.run_statistics import RunStatistics
from dsv3.checkpoint.state import ModelParts, nonfinite_names
from dsv3.config.accidents import OnAlarm
from dsv3.config.model import ModelConfig
from dsv3.config.training import TrainConfig
from dsv3.distributed.process_group import RankContext
from dsv3.errors import RunFailed
from dsv3.metrics import accident_journal
from dsv3.metrics.accident_journal import ACCIDENTS_FILE
from dsv3.metrics.console import Console
from dsv3.metrics.row import MetricsRow
from dsv3.training.gradient_places import MOST, GradientPlaces, Place, ranked
from dsv3.training.step_guard import GOOD, NONFINITE, StepGuard

_KINDS = {1: "nonfinite", 2: "spike"}

_LEARNT, _BETTER = 5, 0.05
"""After so many windows of steps the loss has to be lower by so many nats than that of guessing."""

_REMEDY = "a lower optimizer.lr or longer warm-up may help"


class AccidentWatch:
    """The judgement on each row of a run, and what follows from it for the run."""

    def __init__(
        self,
        train: TrainConfig,
        model: ModelConfig,
        directory: Path,
        ranks: RankContext,
        model_parts: ModelParts,
        guard: StepGuard,
        progress: Progress,
        console: Console,
    ) -> None:
        self.train, self.config, self.model = train, train.accidents, model
        self.directory = directory
        self.ranks = ranks
        self.model_parts = model_parts
        self.places = GradientPlaces(model_parts)
        self.guard = guard
        self.console = console
        self.statistics = progress.statistics
        self.samples = progress.samples
        """Sequences behind the last row that was read."""
        self.over: str | None = None
        """The reason for which the run must end once it is saved."""
        self.wants_rewind = False
        """The run must go back to its last good checkpoint, where it has one."""

    def __call__(self, row: MetricsRow, figures: dict[str, Tensor]) -> None:
        """Look at the row of a step, and fill in its `skipped` and `alarm`; see metrics/recorder.py.

        Raises:
            RunFailed: on all ranks, where the weights are not finite, or bad numbers are not to be skipped.
        """
        first, self.samples = self.samples, row.tokens // self.train.length
        samples = [first, self.samples]
        kind = int(figures["accident"]) if "accident" in figures else GOOD
        if not self.config.skip:
            self._require_finite(row, figures)
        if kind != GOOD and self.config.skip:
            self._note_skipped(row, figures, kind, samples)
        # Also of skipped steps: the loss says how good the weights are, whatever the gradient is.
        if row.loss is not None and math.isfinite(row.loss):
            self._watch_loss(row.step, row.loss, samples)
        if row.evaluation_loss is not None:
            self._watch_evaluation(row, samples)
        row.skipped, row.alarm = self.statistics.skipped, int(self.statistics.alarm)

    def fill(self, progress: Progress) -> None:
        """Write a copy of the statistics into the progress that a checkpoint is about to store."""
        self.statistics.norms = self.guard.good_norms()
        progress.statistics = RunStatistics.from_json(self.statistics.to_json())

    def go_back(self, progress: Progress) -> None:
        """Go on with the statistics of the checkpoint that the run has gone back to."""
        rewinds = self.statistics.rewinds + 1
        self.statistics = progress.statistics
        self.statistics.rewinds = rewinds
        self.guard.load(self.statistics)
        self.wants_rewind = False

    def finish(self, steps: int) -> None:
        """Say at the end of a run of `steps` what its result is worth."""
        losses, window = self.statistics.losses, self.config.alarm_window
        if self.over is None and 0 < steps <= self.statistics.skipped:
            self.over = f"all {steps} steps were skipped, so nothing is learnt: {_REMEDY}"
        # A model that has blown up may end there, too: its logits are all alike.
        elif steps >= _LEARNT * window and math.fsum(losses) / window > self._guessing - _BETTER:
            self.statistics.alarm = True
            self.note("alarm", steps, loss=math.fsum(losses) / window, lowest=self._guessing, since=1)
            self.console.message(
                f"ALARM at the end: the mean loss of {window} steps is no lower than {self._guessing:.3f}, "
                f"that of guessing every token alike, so nothing is learnt: {_REMEDY}"
            )

    @property
    def _guessing(self) -> float:
        """Return the loss of guessing every token alike, in nats."""
        return math.log(self.model.vocab_size)

    def note(self, kind: str, step: int, **values: Any) -> None:
        """Write an entry into accidents.jsonl; on rank 0."""
        if self.ranks.is_main:
            entry = {"kind": kind, "step": step, **values}
            accident_journal.append(self.directory / ACCIDENTS_FILE, entry)

    def _note_skipped(
        self, row: MetricsRow, figures: dict[str, Tensor], kind: int, samples: list[int]
    ) -> None:
        """Tell of a step that was skipped, and end the run where there are too many."""
        own, found = figures.get("gradient_places"), []
        if own is not None:
            found = self.ranks.all_gather_object(self.places.report(own.tolist(), kind != NONFINITE))
        places = ranked((place for of_rank, _ in found for place in of_rank), kind != NONFINITE)
        bad = sum(count for _, count in found)
        # From a loss that is not finite NaN has gone everywhere: then the first router says more.
        begun = all(value is None or math.isfinite(value) for value in (row.loss, row.mtp_loss))
        culprit = places[0] if places and begun else None
        layer = self._layer(figures, culprit)
        weights = self._nonfinite_weights() if kind == NONFINITE else []
        statistics = self.statistics
        statistics.skipped += 1
        statistics.recent = [step for step in statistics.recent if step > row.step - self.config.within]
        statistics.recent.append(row.step)
        limit = figures["spike_limit"].item() if "spike_limit" in figures else math.inf
        self.note(
            _KINDS[kind], row.step, skipped=True, seed=self.train.seed, samples=samples, loss=row.loss,
            mtp_loss=row.mtp_loss, grad_norm=row.grad_norm, fp8_broken_tiles=row.fp8_broken_tiles,
            limit=None if kind == NONFINITE else limit, layer=layer,
            parameter=culprit and culprit.parameter, expert=culprit and culprit.expert,
            parameters=[place.name for place in places], nonfinite_parameters=bad, weights=weights,
        )  # fmt: skip
        told = self._causes(row, figures, kind, limit)
        where = f", at {culprit.name if culprit else layer}" if layer else ""
        data = f"sequences {samples[0]:,} to {samples[1] - 1:,}"
        self.console.message(f"step {row.step} is skipped: {told}{where}; {data}, {ACCIDENTS_FILE}")
        if weights:
            self._weights_are_lost(row, figures, weights)
        elif len(statistics.recent) > self.config.most:
            self._end_with_too_many(row.step, samples)

    def _layer(self, figures: dict[str, Tensor], culprit: Place | None) -> str | None:
        """Return the first layer whose router met what is not finite, else that of the culprit."""
        router = int(figures["first_nonfinite_router"]) if "first_nonfinite_router" in figures else -1
        if router >= 0:
            return self.model.moe_layers()[router]
        return culprit and culprit.layer

    def _causes(self, row: MetricsRow, figures: dict[str, Tensor], kind: int, limit: float) -> str:
        """Return what is wrong with the numbers of a step."""
        if kind != NONFINITE:
            return f"its gradient norm {row.grad_norm:.4g} is a spike (above {limit:.4g})"
        names = ("loss", "mtp_loss", "grad_norm", "evaluation_loss")
        known = {name: value for name in names if (value := getattr(row, name)) is not None}
        causes = [f"{name} {value}" for name, value in known.items() if name != "mtp_loss" or value != value]
        router = figures.get("first_nonfinite_router")
        if router is not None and int(router) >= 0:
            causes.append(f"first at the router of {self.model.moe_layers()[int(router)]}")
        if (row.fp8_broken_tiles or 0.0) > 0:  # NaN is unknown
            causes.append(f"{row.fp8_broken_tiles:.0f} nonfinite FP8 tiles")
        return ", ".join(causes)

    def _nonfinite_weights(self) -> list[str]:
        """Return the names of parameters of any rank that are not finite, at most MOST."""
        own = nonfinite_names((name, p) for part in self.model_parts for name, p in part.named_parameters())
        names = [name for names in self.ranks.all_gather_object(own[:MOST]) for name in names]
        return list(dict.fromkeys(names))[:MOST]

    def _weights_are_lost(self, row: MetricsRow, figures: dict[str, Tensor], weights: list[str]) -> None:
        """End the run, or go back: no step that comes can be good."""
        if self._goes_back():
            return
        causes = self._causes(row, figures, NONFINITE, math.inf)
        raise RunFailed(
            f"step {row.step} is not finite: {causes}, and the weights are not either ({weights[0]}). "
            f"Checkpoints are from before; {_REMEDY}."
        )

    def _require_finite(self, row: MetricsRow, figures: dict[str, Tensor]) -> None:
        """Raise RunFailed for a row whose numbers are not finite: train.accidents.skip is off."""
        values = (row.loss, row.grad_norm, row.evaluation_loss)
        if not all(value is None or math.isfinite(value) for value in values):
            causes = self._causes(row, figures, NONFINITE, math.inf)
            past = f"Checkpoints are from before; {_REMEDY}."
            raise RunFailed(f"step {row.step} is not finite: {causes}. {past}")

    def _end_with_too_many(self, step: int, samples: list[int]) -> None:
        recent, config, since = self.statistics.recent, self.config, self.statistics.above_since
        doubt = f", but marked: its loss is above its past since step {since}" if since else ""
        if self.over is None:
            self.note("too_many", step, samples=samples, skipped_steps=recent)
        self.over = (
            f"{len(recent)} of the last {config.within} steps were skipped, more than "
            f"train.accidents.most={config.most}; {ACCIDENTS_FILE} has each. Step {step} is saved with the "
            f"weights of the last good step{doubt}; {_REMEDY}"
        )

    def _watch_loss(self, step: int, loss: float, samples: list[int]) -> None:
        """Follow the mean loss; raise the alarm where it stays above its past."""
        config, statistics = self.config, self.statistics
        if not math.isfinite(config.alarm_rise):
            return
        statistics.losses = [*statistics.losses, loss][-config.alarm_window :]
        mean = math.fsum(statistics.losses) / len(statistics.losses)
        full = len(statistics.losses) == config.alarm_window
        # A model that guesses every token alike has this loss; one that stays above it has learnt nothing.
        lowest = self._guessing if statistics.lowest is None else statistics.lowest
        if mean <= lowest + config.alarm_rise:
            if statistics.alarm:
                self._tell_loss("recovered", step, mean, lowest, samples)
            statistics.above_since, statistics.alarm = None, False
            if full and mean < lowest:
                statistics.lowest = mean
            return
        if statistics.above_since is None:
            statistics.above_since = step
        if not statistics.alarm and step - statistics.above_since + 1 >= config.alarm_steps:
            statistics.alarm = True
            self._tell_loss("alarm", step, mean, lowest, samples)
            self._goes_back()

    def _tell_loss(self, kind: str, step: int, mean: float, lowest: float, samples: list[int]) -> None:
        since, window = self.statistics.above_since, self.config.alarm_window
        self.note(kind, step, samples=samples, loss=mean, lowest=lowest, since=since)
        told = f"the mean loss of {window} steps is {mean:.3f}, its lowest was {lowest:.3f}"
        if kind == "alarm":
            self.console.message(
                f"ALARM at step {step}: {told}, and it is above since step {since}. "
                "Checkpoints from there on are marked and count as no good ones"
            )
        else:
            self.console.message(f"the alarm is over at step {step}: {told}")

    def _watch_evaluation(self, row: MetricsRow, samples: list[int]) -> None:
        """Take a held-out loss that is not finite for an alarm, which the next one that is ends."""
        assert row.evaluation_loss is not None
        lost, was_lost = not math.isfinite(row.evaluation_loss), self.statistics.held_out_lost
        self.statistics.held_out_lost = lost
        if not lost:
            return
        weights = self._nonfinite_weights()
        value = row.evaluation_loss
        self.note("evaluation", row.step, samples=samples, evaluation_loss=value, weights=weights)
        self.console.message(f"ALARM at step {row.step}: the held-out loss is {value}")
        if weights:
            self._weights_are_lost(row, {}, weights)
        elif not was_lost:
            self._goes_back()

    def _goes_back(self) -> bool:
        """Return whether the run is to rewind; the last of its rewinds ends it."""
        if self.config.on_alarm is not OnAlarm.rewind or self.over is not None:
            return False
        if self.statistics.rewinds >= self.config.max_rewinds:
            self.over = (
                f"the loss is an alarm again after {self.statistics.rewinds} rewinds, of which "
                f"train.accidents.max_rewinds={self.config.max_rewinds} allows no more; "
                f"{ACCIDENTS_FILE} has each: {_REMEDY}"
            )
            return False
        self.wants_rewind = True
        return True
