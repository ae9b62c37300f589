"""What a checkpoint was trained on: its data, tokenizer and length, as defaults of a command that reads it.

training.yaml beside the weights says it. A run of older code has no such file: its config.yaml and
environment.json serve. A checkpoint from elsewhere says nothing but its tokenizer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dsv3.checkpoint.directory import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    HF_DIR,
    TOKENIZER_DIR,
    complete_steps,
    find_checkpoint,
    newest_checkpoint,
    step_number,
)
from dsv3.checkpoint.manifest import verify
from dsv3.checkpoint.training_record import TRAINING_FILE, TrainingRecord, sound_changes
from dsv3.config.data import ROW_ORDER, LocalTokenizerConfig, TrainedTokenizerConfig
from dsv3.config.registry import SCHEMAS, Stored
from dsv3.config.root import Config
from dsv3.config.strict import check_target, escape_interpolation
from dsv3.config.task import TaskConfig
from dsv3.config.upgrade import upgrade_node
from dsv3.errors import UserError
from dsv3.launch.held_out import EVERY_ROW, choice_name, differing, held_out_data, reads_table
from dsv3.launch.job import MICROBATCH_TOKENS, Job
from dsv3.tokens.tokenizer_files import READABLE, has_tokenizer, vocabulary_file
from dsv3.untrusted_files import BadFile, read_json, read_yaml


def training_record(checkpoint: Path) -> TrainingRecord | None:
    """Return what a checkpoint was trained on, None where nothing says it; UserError for a damaged file."""
    if (checkpoint / TRAINING_FILE).is_file():
        verify(checkpoint, [TRAINING_FILE])
        return TrainingRecord.read(checkpoint)
    run = checkpoint.parent.parent
    is_step = checkpoint in complete_steps(run)
    return run_record(run, step_number(checkpoint)) if is_step and (run / CONFIG_FILE).is_file() else None


def run_record(run: Path, step: int = 0) -> TrainingRecord:
    """Return the record of a run by its config.yaml and environment.json; UserError for a damaged config."""
    file = run / CONFIG_FILE
    try:
        config = upgrade_node(read_yaml(file))
    except BadFile:
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{file} cannot be read: it does not say what the run was trained on")
    data = run_data(run)
    prints, changes = (data.get("fingerprint"), data.get("tokenizer_fingerprint")), data.get("changes")
    return TrainingRecord("", prints[0], prints[1], step, config, data_changes=sound_changes(changes))


def run_data(run: Path) -> dict[str, Any]:
    """Return what environment.json says of a run's data; nothing where it cannot be read."""
    try:
        data = read_json(run / ENVIRONMENT_FILE, "listing")["data"]
    except (BadFile, KeyError, TypeError):
        return {}
    return data if isinstance(data, dict) else {}


def tokenizer_folder(checkpoint: Path) -> Path | None:
    """Return the folder of the tokenizer that a checkpoint carries, None where it carries none.

    A tokenizer of a kind that is not read counts: reading it says why and what to do.
    """
    # The assets of HuggingFace have a tokenizer_config.json too, which names bos and eos.
    folders = (checkpoint, checkpoint / HF_DIR, checkpoint / TOKENIZER_DIR)
    readable = (folder for folder in folders if any((folder / name).is_file() for name in READABLE))
    return next(readable, next(filter(has_tokenizer, folders), None))


def require_tokenizer(config: Config, typed: set[str]) -> None:
    """Raise UserError where a command reads text, and the ids that its weights know are not to be had.

    Weights know the ids of one tokenizer. A new one, trained on the text at hand, is taken only where it is
    typed.
    """
    task, load, tokenizer = config.task, config.checkpoint.load, config.tokenizer
    samples = task.reads_checkpoint and not task.reads_rows
    if not task.uses_model or not (task.trains or task.reads_checkpoint) or config.run.resume:
        return
    if not samples and config.data.holds_ids:
        return
    checkpoint = find_checkpoint(load) if load else None
    folder = tokenizer_folder(checkpoint) if checkpoint else None
    typed_one = any(key == "tokenizer" or key.startswith("tokenizer.") for key in typed)
    if isinstance(tokenizer, LocalTokenizerConfig) and tokenizer._target_ == LocalTokenizerConfig._target_:
        place = tokenizer.path
        if (
            checkpoint
            and folder
            and tokenizer
            == checkpoint_tokenizer(checkpoint, training_record(checkpoint), config.run.allow_targets)
        ):
            place = str(folder)
        assert place is not None
        try:
            vocabulary_file(place)
        except UserError as error:
            named = f"tokenizer.path={place}" if typed_one else f"checkpoint.load={load}"
            raise UserError(f"{named}: {error}") from None
    elif load and not folder and not typed_one and tokenizer._target_ == TrainedTokenizerConfig._target_:
        if samples:
            return  # task=generate asks for a path
        raise UserError(
            f"checkpoint.load={load} carries no tokenizer, and its weights know the ids of one: give it, "
            "tokenizer=local tokenizer.path=PATH, or take a new one of this text, tokenizer=trained"
        )


def checkpoint_tokenizer(checkpoint: Path, record: TrainingRecord | None, allow: Sequence[str]) -> Any:
    """Return the node of the tokenizer that a checkpoint goes with, None where it names none.

    While a command has this node, it uses the files of the checkpoint. Raises UserError as `rebuild` does.
    """
    if record is not None and "tokenizer" in record.config:
        return rebuild("tokenizer", record.config["tokenizer"], str(checkpoint), allow)
    folder = tokenizer_folder(checkpoint)
    return None if folder is None else LocalTokenizerConfig(path=str(folder.absolute()))


def carried_values(
    checkpoint: Path, record: TrainingRecord | None, task: type[TaskConfig], allow: Sequence[str]
) -> Stored:
    """Return the defaults that a checkpoint sets for a task: its tokenizer; its data where that is read."""
    defaults, train = {}, {}
    tokenizer = checkpoint_tokenizer(checkpoint, record, allow)
    if tokenizer is not None:
        defaults["tokenizer"] = escape_interpolation(tokenizer)
    if record is not None and task.reads_checkpoint:
        data = record.config.get("data")
        if task.reads_rows and data is not None:
            node = rebuild("data", data, str(checkpoint), allow)
            if node.cache_dir is not None and not Path(node.cache_dir).is_dir():
                node.cache_dir = None  # of another machine
            defaults["data"] = escape_interpolation(node)
        stored = record.config.get("train")
        if isinstance(stored, dict) and type(stored.get("sequence_length")) is int:
            train["sequence_length"] = stored["sequence_length"]
    return Stored(defaults, {"train": train} if train else {})


def forget_length(composed: DictConfig, stored: Stored, typed: set[str]) -> None:
    """Remove a checkpoint's length where the rows of other data have a length of their own."""
    source: Any = OmegaConf.get_type(composed, "data")
    carried = stored.values.get("train", {}).get("sequence_length")
    chosen = typed & {"train.sequence_length", "train"} or composed.train.sequence_length != carried
    if carried is not None and source.sets_sequence_length and not chosen:
        composed.train.sequence_length = None


def rebuild(group: str, stored: Any, where: str, allow: Sequence[str] = ()) -> Any:
    """Return a stored node of a config group as the schema that has its `_target_` and its keys.

    Raises:
        UserError: no schema has them, or the class may not be built.
    """
    node = stored if isinstance(stored, dict) else {}
    target = str(node.get("_target_"))
    choices: list[Any] = [schema for name, schema in SCHEMAS.items() if name.startswith(f"{group}/")]
    if not any(schema._target_ == target for schema in choices):
        check_target(target, f"{where}: {group}._target_", allow)
        if target.startswith("dsv3."):
            raise UserError(f"{where}: {group}._target_={target} is refused: no choice of {group} builds it")
    # A class of the user's may stand in the place of one of ours: then the keys decide.
    for schema in sorted(choices, key=lambda schema: schema._target_ != target):
        if node.keys() <= {f.name for f in fields(schema)}:
            try:
                merged = OmegaConf.merge(OmegaConf.structured(schema), escape_interpolation(node))
                return OmegaConf.to_object(merged)
            except OmegaConfBaseException as error:
                reason = str(error).splitlines()[0]
                raise UserError(f"{where}: what it says of {group} is not possible: {reason}") from None
    raise UserError(
        f"{where}: no choice of {group} here has the keys {', '.join(sorted(map(str, node)))} of {target}: "
        f"choose one, {group}=..."
    )


def reads_own_data(config: Config, record: TrainingRecord | None, typed: set[str]) -> bool:
    """Return True where a command reads the data that its checkpoint was trained on, by its own split.

    UserError where that data is gone, with the place where the run had it.
    """
    stored = record.config.get("data") if record is not None and config.task.reads_rows else None
    if not isinstance(stored, dict) or "data" in typed or stored.get("_target_") != config.data._target_:
        return False
    path = stored.get("path")
    if path is not None and path == getattr(config.data, "path", None) and not _is_there(config, path):
        raise UserError(
            f"checkpoint.load={config.checkpoint.load} was trained on data.path={path}, which is not there: "
            "name the place where it is now, data.path=PATH"
        )
    return True


def _is_there(config: Config, path: str) -> bool:
    """Return True where a run's data.path leads to something."""
    if not config.data.holds_ids:
        return Path(path).exists()
    from dsv3.tokens.token_inputs import is_there  # with numpy, which other data does not need here

    return is_there(path)


def with_own_microbatch(job: Job, record: TrainingRecord, chosen: int | None) -> Config:
    """Return the job's config with the microbatches of the run, whose sums then round alike.

    A microbatch that was chosen stays, and so does the default where the run's has more tokens than it, for
    which this machine may have no room, or where a pipeline has rules for it.
    """
    config, stored = job.config, record.config.get("train", {})
    size, length = stored.get("microbatch_size"), stored.get("sequence_length")
    fits = type(size) is int and 0 < size * config.train.length <= MICROBATCH_TOKENS
    if chosen is None and fits and length == config.train.length and job.plan.degrees.pp == 1:
        return replace(config, train=replace(config.train, microbatch_size=size))
    return config


def other_data_notes(run: TrainingRecord) -> list[str]:
    """Return a line where a run trains on other data than the checkpoint it starts from, or other ids."""
    load = run.config.get("checkpoint", {}).get("load")
    resumed = run.config.get("run", {}).get("resume")
    first = training_record(find_checkpoint(load)) if load and not resumed else None
    if first is None:
        return []
    notes = []
    trained, here = (
        held_out_data(record.config, record.data_fingerprint, record.tokenizer_fingerprint)
        for record in (first, run)
    )
    differ = differing({"checkpoint": trained, "run": here})
    if "data" in differ:
        places = [told["data"][1] for told in (trained, here)]
        prints = [record.data_fingerprint for record in (first, run)]
        told = [f"data={place} (fingerprint {found})" for place, found in zip(places, prints, strict=True)]
        notes.append(f"the checkpoint was trained on {told[0]}, this run trains on {told[1]}")
    if "tokenizer" in differ:
        notes.append("the checkpoint knows the ids of another tokenizer: the run has its own, as chosen")
    return notes


def changed_data_notes(changes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each of the `data_changes` that a run was told to go on with."""
    return [
        f"its data changed after step {each['step']:,} (fingerprint {each['from']}, then {each['to']}), "
        f"allowed by data.allow_change=true: {each['what']}; {each['effect']}"
        for each in changes
    ]


def other_order_notes(run_dir: Path) -> list[str]:
    """Return a line where older code has trained the run in `run_dir` on rows in another order."""
    newest = newest_checkpoint(run_dir)
    before = training_record(newest) if newest else None
    if before is None or before.step == 0 or before.row_order == ROW_ORDER:
        return []
    note = (
        f"up to step {before.step} older code read the rows in another order: "
        "some rows come again from here on, and others are left out"
    )
    if reads_table(before.config):
        note += "; other rows are held out than before, and the run was trained on most of them"
    return [note]


def untold_note(config: Config, checkpoint: Path) -> str:
    """Return a line on what a command reads with a checkpoint that does not say what it was trained on."""
    data, used = config.data, []
    if config.task.reads_rows:
        path = getattr(data, "path", None)
        used.append(f"data={choice_name('data', data._target_)}{f' {path}' if path else ''}")
        share = f"{data.held_out:.4g} of the documents held out"
        used.append(EVERY_ROW if data.holds_ids else share)
        if not data.sets_sequence_length:
            used.append(f"rows of {config.train.length:,} tokens")
        used.append("a document mask" if data.document_mask else "no document mask")
    if not (config.task.reads_rows and data.holds_ids):
        folder, node = tokenizer_folder(checkpoint), checkpoint_tokenizer(checkpoint, None, ())
        own = folder is not None and config.tokenizer == node
        choice = choice_name("tokenizer", config.tokenizer._target_)
        used.append(f"the tokenizer of {folder}" if own else f"tokenizer={choice}")
    load = config.checkpoint.load
    return f"checkpoint.load={load} does not say what it was trained on; used: {', '.join(used)}"
