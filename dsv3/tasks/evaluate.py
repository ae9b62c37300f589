"""task=evaluate: measure the held-out loss and perplexity of a checkpoint."""

import json
import math
import os
from typing import Any

from dsv3.checkpoint.load import stored_weights
from dsv3.checkpoint.training_record import TrainingRecord
from dsv3.config.convergence import shown
from dsv3.config.strict import to_yaml
from dsv3.data.sources import PreparedData
from dsv3.distributed.process_group import make_deterministic
from dsv3.errors import RunFailed
from dsv3.launch.held_out import (
    EVERY_ROW,
    HeldOutData,
    choice_name,
    differing,
    held_out_data,
    precision_choice,
)
from dsv3.launch.job import Job
from dsv3.launch.sweep import record_result
from dsv3.launch.trained_on import changed_data_notes, training_record
from dsv3.metrics.console import Console
from dsv3.tasks.setup import join_ranks, load_model, load_own_tokenizer, prepare_data, require_checkpoint
from dsv3.training.evaluation import NO_TARGET, evaluate

READING_KEYS = ("pad_id", "dtype", "eos_id", "held_out_path", "field", "separator")
"""Keys of data, beside those of HeldOutData, by which the same files hold other tokens."""


class EvaluateTask:
    """Prints a table to stderr and `{"loss": .., "perplexity": .., "tokens": ..}` as stdout's last line.

    Loss and perplexity are null where no row has a target. The keys behind these three say what the loss was
    measured on (docs/checkpoints.md).
    """

    def run(self, job: Job) -> float | None:
        """Return the held-out loss in nats, a sweep's objective; write nothing but the data cache.

        None where no row has a target. RunFailed where the loss is not finite.
        """
        config = job.config
        checkpoint = require_checkpoint(job)
        make_deterministic(config.train.deterministic, config.train.seed)
        with join_ranks(job) as ranks:
            # Of ids that are given every row is scored, unless the files mark what is held out; of a run's
            # own ids those that it held out.
            given = config.data.holds_ids and not job.own_data
            held_out_only = given or not config.data.holds_ids
            data = prepare_data(config, ranks, load_own_tokenizer(config, checkpoint), evaluate=held_out_only)
            every_row = given and not getattr(data, "marks_held_out", False)
            model, ranks = load_model(job, ranks)
            loss, tokens, sources = evaluate(
                model.forward_backward,
                data.held_out,
                config.train.microbatch,
                ranks,
                config.train.evaluate_tokens,
            )
            if loss is not None and not math.isfinite(loss):
                raise RunFailed(f"the held-out loss of {checkpoint} is {loss}")
            if ranks.is_main:
                # exp overflows a float above 709
                perplexity = None if loss is None else math.exp(min(loss, 700.0))
                measured: dict[str, Any] = {"loss": loss, "perplexity": perplexity, "tokens": tokens}
                if sources:
                    measured["sources"] = {
                        name: {"loss": source.loss, "tokens": source.tokens}
                        for name, source in sources.items()
                    }
                record = training_record(checkpoint)
                here = _held_out_data(job, data, every_row)
                run = None if record is None else _run_data(record, len(data.held_out))
                differs = {} if run is None else differing({"here": here, "run": run})
                described = _describe(job, data, every_row)
                told = measured | {"checkpoint": str(checkpoint)} | described
                told["weights"] = stored_weights(checkpoint)
                told["comparable"] = None if record is None else not differs
                told["run_precision"] = None if record is None else precision_choice(record.config)
                if job.sweep is not None:
                    record_result(job.run_dir, {"held_out_data": here})
                notes = [] if record is None else changed_data_notes(record.data_changes)
                if record is not None and (read_otherwise := _read_otherwise(job, record)):
                    notes.append(f"it had {read_otherwise}, and so other tokens of the same files")
                _report(told, data, differs, notes)
                print(json.dumps(told), flush=True)
            return loss


def _held_out_data(job: Job, data: PreparedData, every_row: bool) -> HeldOutData:
    """Return what decides on which tokens this loss is measured."""
    config = to_yaml(job.config)
    if every_row:
        config["data"]["held_out"] = EVERY_ROW
    return held_out_data(config, data.fingerprint, data.tokenizer_fingerprint, len(data.held_out))


def _run_data(record: TrainingRecord, rows: int) -> HeldOutData:
    """Return what decides on which tokens the run that trained the checkpoint measures its losses.

    Of equal data it holds out as many `rows` as here.
    """
    fingerprints = (record.data_fingerprint, record.tokenizer_fingerprint)
    return held_out_data(record.config, *fingerprints, rows, row_order=record.row_order)


def _read_otherwise(job: Job, record: TrainingRecord) -> str:
    """Return the keys, as the run had them, by which it read other tokens of the same files, or nothing."""
    here, run = to_yaml(job.config)["data"], record.config.get("data")
    if not isinstance(run, dict) or here["_target_"] != run.get("_target_"):
        return ""
    places = [node.get("path") for node in (here, run)]
    if not all(isinstance(place, str) for place in places) or len(set(map(os.path.abspath, places))) > 1:
        return ""
    differing_keys = [key for key in READING_KEYS if key in here and here[key] != run.get(key)]
    return " ".join(f"data.{key}={shown(run.get(key))}" for key in differing_keys)


def _describe(job: Job, data: PreparedData, every_row: bool) -> dict[str, Any]:
    """Return what the loss is measured on, by the keys of the JSON."""
    config, tokenizer = job.config, data.tokenizer
    return {
        "data": choice_name("data", config.data._target_),
        "data_path": getattr(config.data, "path", None) or getattr(config.data, "dataset", None),
        "data_fingerprint": data.fingerprint,
        "held_out": None if every_row else config.data.held_out,
        "sequence_length": data.sequence_length,
        "document_mask": config.data.document_mask,
        "precision": precision_choice(to_yaml(config)),
        "tokenizer": tokenizer and choice_name("tokenizer", config.tokenizer._target_),
        "tokenizer_fingerprint": data.tokenizer_fingerprint,
    }


def _report(
    told: dict[str, Any], data: PreparedData, differs: dict[str, dict[str, Any]], changes: list[str]
) -> None:
    """Print the table to stderr, and a line where the loss is not comparable with those of the run."""
    console = Console(stderr=True)
    place = f" {told['data_path']}" if told["data_path"] else ""
    share = EVERY_ROW if told["held_out"] is None else f"{told['held_out']:.4g} held out"
    rows = [
        ("checkpoint", told["checkpoint"]),
        (
            "weights",
            told["weights"] if told["weights"] == "fp32" else f"rounded to {told['weights']} as stored",
        ),
        ("data", f"{told['data']}{place}, {share}, fingerprint {told['data_fingerprint']}"),
        *(("", line) for line in data.told[1:]),
        ("sequence length", f"{told['sequence_length']:,}"),
        ("document mask", "on" if told["document_mask"] else "off"),
        ("precision", told["precision"]),
    ]
    if data.tokenizer is not None:
        size, fingerprint = data.tokenizer.size, told["tokenizer_fingerprint"]
        rows.append(("tokenizer", f"{told['tokenizer']}, {size:,} ids, fingerprint {fingerprint}"))
    rows += [
        ("tokens", f"{told['tokens']:,}"),
        ("loss", NO_TARGET if told["loss"] is None else f"{told['loss']:,.4f}"),
    ]
    if told["perplexity"] is not None:
        rows.append(("perplexity", f"{told['perplexity']:,.4f}"))
    for name, source in told.get("sources", {}).items():
        shown_loss = "unknown" if source["loss"] is None else f"{source['loss']:,.4f}"
        rows.append((f"  {name}", f"{shown_loss} on {source['tokens']:,} tokens"))
    console.table("Held-out", rows)
    if differs:
        pairs = (f"{key} {shown(at['here'])} (the run: {shown(at['run'])})" for key, at in differs.items())
        console.message(f"not comparable with the losses of the run: {', '.join(pairs)}")
    own = told["run_precision"]
    if own not in (None, told["precision"]):
        console.message(f"the run computed in {own}: precision={own} gives its losses")
    for change in changes:
        console.message(f"the run: {change}")
    for note in data.tokenizer.notes() if data.tokenizer is not None else []:
        console.message(note)
    console.close()
