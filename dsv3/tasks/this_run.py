"""Tell what a run is about to do: one block at its start, each line a fact with the reason for it.

Everything that the run took without being told is here: counts of the data, the tokenizer, values that were
filled in, and the implementations that were chosen. Each fact is read from where it was decided.
"""

import os
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dsv3.checkpoint.directory import find_checkpoint
from dsv3.checkpoint.training_record import TrainingRecord
from dsv3.config.logger import WandbLoggerConfig
from dsv3.config.mixture import SOURCES
from dsv3.config.optimizer import MuonConfig
from dsv3.config.parallel import WORLD_AXES, RecomputeMode
from dsv3.config.precision import FP8Engine
from dsv3.config.training import BIAS_SPEED, TrainConfig
from dsv3.data.mixture import PreparedMixture
from dsv3.data.sources import PreparedData
from dsv3.data.token_shards import PreparedShards
from dsv3.fp8.convert_model import fp8_engine_name
from dsv3.launch.checkpoint_defaults import described_model
from dsv3.launch.held_out import choice_name
from dsv3.launch.job import Job
from dsv3.metrics.progress import amount
from dsv3.metrics.wandb import effective_mode
from dsv3.model.attention_kernels import explain_kernel
from dsv3.model.moe import MoE
from dsv3.parallel.deepep import DeepEPTokenDispatcher
from dsv3.parallel.token_dispatch import AllToAllTokenDispatcher
from dsv3.planning import parameters
from dsv3.planning.batch_schedule import BatchSchedule
from dsv3.planning.parameter_groups import parameter_groups
from dsv3.training.callbacks import TrainingRun
from dsv3.training.evaluation import rows_to_score
from dsv3.training.schedule import build_schedule

THIS_RUN_FILE = "this_run.txt"

TITLE = "This run:"

GIB = 2**30

WIDTH = 88
"""Columns of the typed keys, which with their subject make about 100."""

Fact = tuple[str, str]
"""A subject, empty where the line goes on with the one above, and what there is to say."""


@dataclass(frozen=True)
class RunFacts:
    """The sources of the block, all of rank 0."""

    job: Job
    run: TrainingRun
    data: PreparedData
    record: TrainingRecord
    owns_tokenizer: bool
    """The tokenizer came with the weights, not from the config."""

    def lines(self) -> list[str]:
        """Return the block as lines of text, its title first."""
        facts = [
            *self._model(),
            *self._typed(),
            *self._data(),
            *self._batch(),
            *self._computation(),
            *self._learning(),
            *self._upkeep(),
            *((("", "recipe")[number == 0], line) for number, line in enumerate(self.job.recipe)),
            *(("note", note) for note in self.job.notes),
        ]
        width = max(len(subject) for subject, _ in facts)
        return [TITLE, *(f"  {subject:<{width}}  {text}" for subject, text in facts)]

    def _reason(self, key: str) -> str:
        """Return why a value was filled in, in parentheses; nothing for one that was given."""
        reason = self.job.reasons.get(key)
        return f" ({reason})" if reason else ""

    def _model(self) -> Iterator[Fact]:
        job, config = self.job, self.job.config
        model, load = config.model, config.checkpoint.load
        typed = [text.lstrip("+") for text in job.overrides]
        if any(text.startswith("model=") for text in typed) or not load:
            name = job.choices.get("model", "model")
        else:
            name = f"that of {load}"
        total, active = parameters.total(model), parameters.active(model)
        yield "model", f"{name}: {total:,} parameters, {active:,} active per token"
        if changed := [text for text in typed if text.startswith("model.")]:
            yield "", f"changed: {' '.join(changed)}"
        if (study := job.choices.get("experiments", "null")) not in ("null", "None"):
            yield "experiment", study
        if self.run.step:
            steps = f"after step {self.run.step:,} of {config.train.steps:,}"
            yield "weights", f"those of the run: it goes on {steps} in {self.run.directory}"
        elif load:
            yield "weights", f"those of checkpoint.load={load}; step 0 and a new optimizer"
        else:
            yield "weights", f"initial ones of train.seed={config.train.seed}"

    def _typed(self) -> Iterator[Fact]:
        """Yield what was typed, but the place of the run and the model's keys, which stand beside it."""
        texts = [text for text in self.job.overrides if not text.lstrip("+").startswith(("model.", "run."))]
        lines = textwrap.wrap(" ".join(texts), WIDTH, break_long_words=False, break_on_hyphens=False)
        yield from ((("", "typed")[number == 0], line) for number, line in enumerate(lines))

    def _data(self) -> Iterator[Fact]:
        config, counts = self.job.config, self.data.summary
        path = getattr(config.data, "path", None) or getattr(config.data, "dataset", None)
        told = choice_name("data", config.data._target_) + (f" {path}" if path else "")
        first, *others = self.data.told or [""]
        if first:
            tokens = sum(counts.get(f"tokens_{side}", 0) for side in ("train", "held_out"))
            about = "about " if config.data.sets_sequence_length and counts.get("tokens_padding") else ""
            told += f": {about}{tokens:,} tokens in {first}"
        yield "data", told
        yield from (("", line) for line in others)
        if "rows_per_epoch" in counts:  # of a stream nobody knows them before they are read
            yield from self._rows(config.train, counts)
        if self.data.tokenizer is not None:
            yield "tokenizer", self._tokenizer(self.data.tokenizer.size)
            yield "", f"a document is {self.data.tokenizer.document}"

    def _rows(self, train: TrainConfig, counts: Mapping[str, int]) -> Iterator[Fact]:
        """Yield what the data amounts to, and how much of it the run takes."""
        sides = {"train": "training", "held_out": "held out"}
        is_table = self.job.config.data.sets_sequence_length
        documents = {s: amount(counts[f"documents_{s}"], "rows" if is_table else "documents") for s in sides}
        about = "about " if is_table and counts.get("tokens_padding") else ""
        both = (f"{sides[s]} {documents[s]}, {about}{counts[f'tokens_{s}']:,} tokens" for s in sides)
        yield "", "; ".join(both)
        length = self.data.sequence_length
        rows, asked = counts["rows_per_epoch"], BatchSchedule.of(train).samples_after(0, train.steps)
        left_out = counts.get("tokens_left_out")
        rest = f", {left_out:,} tokens too few for a row left out" if left_out else ""
        told = f"{rows:,} rows of {length:,} tokens per epoch{rest}"
        if isinstance(self.data, PreparedMixture):
            yield "", f"{train.steps:,} steps take {asked:,} rows"
            yield from self._mixture(self.data, asked)
        else:
            yield "", f"{told}; {train.steps:,} steps take {asked:,} rows, {_epochs(asked / rows)} epochs"
            yield from _packing(counts, rows * (length + 1))

    def _mixture(self, mixture: PreparedMixture, samples: int) -> Iterator[Fact]:
        """Yield a line per source: what the run takes of it, and how its rows are packed."""
        taken = mixture.order.counts(samples)
        for (name, source), rows in zip(mixture.sources.items(), taken, strict=True):
            own = source.summary["rows_per_epoch"]
            told = f"{name}: {rows:,} rows ({rows / max(1, samples):.1%}) of {own:,} per epoch"
            yield "", f"{told}, {_epochs(rows / own)} epochs"
            yield from (("", f"{name}: {line}") for line in source.told)
            for _, packing in _packing(source.summary, own * (source.sequence_length + 1)):
                yield "", f"{name}: {packing}"

    def _tokenizer(self, size: int) -> str:
        config = self.job.config
        vocabulary = f"{size:,} ids, and the model's vocabulary has {config.model.vocab_size:,}"
        if self.owns_tokenizer:
            load = f"from checkpoint.load={config.checkpoint.load}"
            return f"{'that of the run' if config.run.resume else load}: {vocabulary}"
        if path := getattr(config.tokenizer, "path", None):
            return f"from tokenizer.path={path}: {vocabulary}"
        if config.data.holds_ids:
            return f"that of the shards: {vocabulary}"
        if isinstance(self.data, PreparedMixture):  # one tokenizer for all; that of shards goes before
            for name, source in self.data.sources.items():
                if isinstance(source, PreparedShards) and source.tokenizer is not None:
                    return f"that of {SOURCES}.{name}: {vocabulary}"
        count = self.data.summary.get("characters_train")
        trained = f"the training side, {amount(count, 'characters')}" if count else "the begin of the stream"
        return f"trained on {trained}: {vocabulary}"

    def _batch(self) -> Iterator[Fact]:
        train, shape = self.job.config.train, self.job.plan.shape
        told = f"{train.batch:,} sequences{self._reason('train.global_batch_size')}"
        told += f" x {train.length:,} tokens{self._reason('train.sequence_length')}"
        yield "batch", f"{told} = {train.batch * train.length:,} tokens per step"
        batch = BatchSchedule.of(train)
        if batch.start is not None:
            ends = f"step {batch.ramp_steps + 1:,} is the first of the whole batch"
            yield "", f"ramp from {batch.told()}{self._reason('train.batch_ramp.increment')}; {ends}"
        micro = f"{train.microbatch:,} sequences per rank{self._reason('train.microbatch_size')}"
        accumulated = " (gradient accumulation)" if shape.microbatches > 1 else ""
        yield "microbatch", f"{micro}, {shape.microbatches:,} per step{accumulated}"

    def _computation(self) -> Iterator[Fact]:
        job, config = self.job, self.job.config
        plan, device = job.plan, self.run.ranks.device
        part = self.run.forward_backward.model_parts[0]
        degrees = plan.degrees.to_json()
        auto = [axis for axis in (*WORLD_AXES, "ep") if config.parallel.degrees.is_auto(axis)]
        axes = [f"{axis} {n}{' (auto)' * (axis in auto)}" for axis, n in degrees.items() if n > 1]
        name = job.choices.get("parallel", "parallel")
        ranks = f"{amount(plan.world_size, 'ranks')} of {job.hardware.name}"
        yield "layout", f"{name}: {ranks}{': ' if axes else ''}{', '.join(axes)}"
        need, has = plan.memory.total / GIB, plan.hardware.memory_bytes
        room = f" of {has / GIB:,.2f} GiB" if has else ""
        yield "memory", f"{need:,.3g} GiB{room} per rank, as planned (plan.txt)"
        given = "as in the run, or typed now" if config.run.resume else "as configured"
        reason = job.reasons.get("precision.compute", given)
        yield "precision", f"{config.precision.label}: {reason}"
        if engine := fp8_engine_name(self.run.forward_backward.model_parts):
            assert config.precision.fp8 is not None
            emulated = engine == FP8Engine.emulated.name
            slow = "; products are emulated, the same numbers, slower" if emulated else ""
            chosen = config.precision.fp8.engine.name
            yield "FP8 engine", f"{engine}: precision.fp8.engine={chosen} on {device.type}{slow}"
        kernel, why = explain_kernel(
            config.model.attention, device, part.compute_dtype, config.data.document_mask, plan.degrees.cp
        )
        yield "attention", f"{kernel}: {why}"
        dispatchers = [module.dispatcher for module in part.modules() if isinstance(module, MoE)]
        if dispatchers and isinstance(dispatchers[0], AllToAllTokenDispatcher):
            levels = " x ".join(str(group.size()) for group in dispatchers[0].groups)
            yield "experts", f"rows travel by all_to_all over {levels} ranks"
        elif dispatchers and isinstance(dispatchers[0], DeepEPTokenDispatcher):
            yield "experts", f"rows travel by DeepEP over {plan.degrees.ep} ranks"
        if config.compile.enabled:
            yield "compile", f"each layer by {config.compile.backend.name}"
        if config.recompute.mode is not RecomputeMode.none:
            yield "recompute", config.recompute.mode.name

    def _learning(self) -> Iterator[Fact]:
        config = self.job.config
        train, optimizer, end = config.train, config.optimizer, config.schedule.total_steps
        told = f"{choice_name('optimizer', optimizer._target_)}, peak learning rate {optimizer.lr:g}"
        if (decay := getattr(optimizer, "weight_decay", 0.0)) > 0:
            told += f", weight decay {decay:g}, none for {' '.join(optimizer.no_decay) or 'nothing'}"
        for pattern, scale in optimizer.lr_scale.items():
            told += f", {scale:g} times the rate for {pattern}"
        yield "optimizer", told
        if isinstance(optimizer, MuonConfig):
            factor, betas = optimizer.adamw_lr_scale, ",".join(f"{beta:g}" for beta in optimizer.adamw_betas)
            rest = "the embedding, the head, routers and norms"
            yield "", f"{rest} by AdamW: {factor:g} times the rate, betas [{betas}]"
        if optimizer.frozen:
            names = set(parameter_groups(optimizer, config.model))
            trained = parameters.numel(w for w in parameters.every_weight(config.model) if w.name in names)
            total = parameters.total(config.model)
            frozen = " ".join(optimizer.frozen)
            yield "", f"frozen {frozen}: {trained:,} of {total:,} parameters are trained"
        assert end is not None
        schedule, warmup = build_schedule(config), config.schedule.warmup_steps
        told = f"{choice_name('schedule', config.schedule._target_)}, {amount(warmup, 'steps')} of warm-up"
        told += self._reason("schedule.warmup_steps")
        yield "schedule", f"{told}, {optimizer.lr * schedule(end):g} at its end, step {end:,}"
        balance, mtp = train.balance, train.mtp_loss
        if config.model.num_moe_layers and config.model.moe.selection_bias:
            if balance.speed == 0:
                stay = f"expert biases stay as they are{self._reason('train.balance.bias_speed')}"
                yield "biases", f"{stay}: train.balance.bias_speed={BIAS_SPEED:g} moves them"
            else:
                until = f"until step {schedule.last_step(balance.bias_until):,}"
                yield "biases", f"expert biases move by {balance.speed:g} per step {until}"
        if config.model.mtp_depths:
            switch = f"until step {schedule.last_step(mtp.switch_at):,}, then {mtp.final_weight:g}"
            depths = amount(config.model.mtp_depths, "depths")
            yield "MTP loss", f"{depths}, weight {mtp.weight:g} {switch}"
        elif left_out := self._mtp_left_out():
            yield "MTP loss", f"none; the checkpoint has {amount(left_out, 'depths')}, left out here"

    def _mtp_left_out(self) -> int:
        """Return the MTP depths that the checkpoint has and the model, which has none, leaves out."""
        load, resume = self.job.config.checkpoint.load, self.job.config.run.resume
        stored = described_model(find_checkpoint(load)) if load and not resume else None
        return stored.mtp_depths if stored else 0

    def _samples(self) -> str:
        """Return how often a text is sampled, and what cuts it off."""
        train, sample = self.job.config.train, self.job.plan.between_steps.sample()
        if not train.sample_every:
            return "never" if "train.generate_every" in self.job.reasons else "never (train.generate_every=0)"
        most = f"at most {train.generate_seconds:g} s each"
        cut = " and cut off there" if sample.seconds > train.generate_seconds else ""
        return f"every {train.sample_every:,} steps and at the end, {most}{cut}"

    def _upkeep(self) -> Iterator[Fact]:
        config, rows = self.job.config, self.data.held_out
        train, kept = config.train, config.checkpoint
        share = amount(len(rows), "held-out rows")
        scored = len(rows_to_score(rows, train.evaluate_tokens))
        if scored < len(rows):
            every_row = "train.evaluate_tokens=null scores all"
            share = f"{scored:,} of {share}, spread evenly ({every_row})"
        every = f"every {train.evaluate_every:,} steps and at the end"
        yield "evaluation", f"{every}, {share}" if train.evaluate_every else "never (train.evaluate_every=0)"
        if self.data.tokenizer is not None:
            yield "samples", f"{self._samples()}{self._reason('train.generate_every')}"
        every = f"every {train.checkpoint_every:,} steps and at the end"
        stay = [f"the newest {kept.keep_last}"]
        stay += [f"every {kept.keep_every:,} steps'"] if kept.keep_every else []
        stay += ["the best"] if kept.keep_best else []
        yield "checkpoints", f"{every if train.checkpoint_every else 'at the end'}; {', '.join(stay)} stay"
        logger = config.logger
        if isinstance(logger, WandbLoggerConfig):
            mode, why = effective_mode(logger.mode, os.environ)
            yield "logger", f"wandb {mode}: {why}"
        else:
            yield "logger", choice_name("logger", logger._target_)
        yield "convergence", f"{self.record.convergence}, equal for runs that learn the same"


def _epochs(epochs: float) -> str:
    return f"{epochs:.2f}" if epochs >= 0.01 else "less than 0.01"


def _packing(counts: Mapping[str, int], positions: int) -> Iterator[Fact]:
    """Yield how the documents lie in rows, and how many are rearranged; rows that are given have no such."""
    if "documents_cut" in counts:
        documents = counts["documents_train"]
        cut, padding = counts["documents_cut"] / documents, counts["tokens_padding"] / positions
        about = "" if counts["tokens_padding"] else "about "
        yield "", f"{about}{cut:.2%} of the documents are cut, {padding:.2%} of the rows is padding"
    if counts.get("documents_fim"):
        yield "", f"{counts['documents_fim']:,} documents in the form of fill-in-the-middle in every epoch"
