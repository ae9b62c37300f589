"""Compose a command over what a checkpoint carries, so that everything typed acts over its values.

model=hf, checkpoint.load and the input of convert.py bring a model with them. Where it lies is known only
once the command is composed. The command is then composed a second time, with the checkpoint's values as
defaults of the root. Values of an experiment and keys that are typed win by Hydra's own rules, also where
they equal a default of the schema. trained_on.py adds the data and the tokenizer of a checkpoint.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dsv3.checkpoint.directory import MODEL_FILE, find_checkpoint, is_hf_checkpoint
from dsv3.checkpoint.manifest import verify_description
from dsv3.config.model import HFModelConfig, ModelConfig
from dsv3.config.model_difference import StoredModel, require_stored_numbers
from dsv3.config.overrides import as_typed, compose, job_overrides, override_key, split_override
from dsv3.config.registry import Stored
from dsv3.config.root import Config
from dsv3.config.strict import escape_interpolation, validate
from dsv3.config.upgrade import upgrade_node
from dsv3.errors import UserError, repository_hint
from dsv3.hf.config_json import model_from_hf
from dsv3.launch.trained_on import carried_values, forget_length, training_record
from dsv3.launch.typed_keys import typed_leaves
from dsv3.untrusted_files import read_yaml

_MODEL_SOURCES = ("model", "model.path", "experiments")
"""The arguments that bring a model, beside those of single keys."""


@dataclass(frozen=True)
class Composition:
    """Hold the way a command was composed, so that it can be composed again over other defaults."""

    overrides: Sequence[str]
    """As Hydra takes them, quoted."""
    search: Sequence[str] = ()
    """Folders of config files beside dsv3's own, as Hydra's URLs."""
    root: str = "config"

    @classmethod
    def of_this_job(cls, root: str = "config") -> "Composition":
        """Return the composition of the job that Hydra runs now."""
        hydra = HydraConfig.get()
        own = [source.path for source in hydra.runtime.config_sources if source.schema == "file"]
        # The first file source is conf/ itself.
        return cls(job_overrides(), [f"file://{Path(path).absolute()}" for path in own[1:]], root)

    @property
    def keys(self) -> set[str]:
        """Return the keys that the overrides set."""
        return {override_key(override) for override in self.overrides}

    def compared(self, where: str, stored: ModelConfig | None, here: ModelConfig) -> list[str]:
        """Return lines on the numbers of `here` that the command types other than `stored` has them.

        `where` is the argument that names the checkpoint.

        Raises:
            UserError: a number differs that was not typed as model.KEY=.
        """
        if stored is None:
            return [f"{where} does not say which model it is: names and shapes alone are compared"]
        typed = {override: pair for override in self.overrides if (pair := split_override(override))}
        sources = [
            as_typed(each)
            for each, (key, value) in typed.items()
            if key in _MODEL_SOURCES and value != "null"
        ]
        leaves = {key for key, _ in typed_leaves(typed)}
        return require_stored_numbers(StoredModel(where, stored), here, leaves, sources)

    def over(self, stored: Stored) -> DictConfig:
        """Return the command composed with the values of a checkpoint in place of the root's defaults."""
        return compose(self.overrides, self.search, self.root, stored)


def read_model(path: Path) -> ModelConfig:
    """Return the model of a model.yaml, by today's names."""
    content = read_yaml(path)
    try:
        content = upgrade_node(content, "model")
        stored = OmegaConf.merge(OmegaConf.structured(ModelConfig), escape_interpolation(content))
        model: Any = OmegaConf.to_object(stored)
        assert isinstance(model, ModelConfig)
        validate(model)
        return model
    except Exception as error:
        place = f"{error.full_key}: " if isinstance(error, OmegaConfBaseException) and error.full_key else ""
        raise UserError(f"{path} is not a model: {place}{str(error).splitlines()[0][:300]}") from None


def checkpoint_model(checkpoint: Path) -> ModelConfig:
    """Return the model that a checkpoint describes; UserError where it does not say."""
    model = described_model(checkpoint)
    if model is None:
        raise UserError(f"{checkpoint / MODEL_FILE} is missing: say which model it is, model=...")
    return model


def described_model(checkpoint: Path) -> ModelConfig | None:
    """Return the model of a checkpoint's config.json or model.yaml, None for a DCP without a model.yaml."""
    if is_hf_checkpoint(checkpoint):
        return model_from_hf(checkpoint)
    verify_description(checkpoint)
    file = checkpoint / MODEL_FILE
    return read_model(file) if file.is_file() else None


def stored_model_notes(config: Config, command: Composition) -> list[str]:
    """Return lines on the numbers that `command` types other than the checkpoint of its weights has them.

    A resumed run keeps its model (run_dir.check_same_run).

    Raises:
        UserError: a number differs that was not typed as model.KEY=.
    """
    load, path = config.checkpoint.load, getattr(config.task, "path", None)
    if config.run.resume:
        return []
    if config.task.path_is_model_path and path is not None:
        if not is_hf_checkpoint(Path(path)):
            return []  # the task says what is wrong with it
        key = "task.path" if "task.path" in command.keys else "model.path"
        return command.compared(f"{key}={path}", model_from_hf(Path(path)), config.model)
    # Where nothing typed names the model it is the checkpoint's: its description need not be read again.
    if load is None or not any(re.split(r"[.@]", key)[0] in ("model", "experiments") for key in command.keys):
        return []
    return command.compared(f"checkpoint.load={load}", described_model(find_checkpoint(load)), config.model)


def compose_over_checkpoint(composed: DictConfig, command: Composition) -> DictConfig:
    """Return train.py's config over what lies elsewhere; `composed` where it names nothing.

    The model comes from model.path with model=hf, or from checkpoint.load unless a model was chosen. The
    tokenizer, and for evaluation the data, are those that checkpoint.load was trained on (trained_on.py). A
    resumed run has all this in its own config.yaml: the place where it came from may be gone.
    """
    from_hf = OmegaConf.get_type(composed, "model") is HFModelConfig
    task: Any = OmegaConf.get_type(composed, "task")
    path = composed.model.path if from_hf else None
    load = OmegaConf.select(composed, "checkpoint.load")
    carried = Stored()
    if composed.run.resume:
        plain_model(composed)
        return composed
    if load:
        checkpoint = find_checkpoint(load)
        allow = OmegaConf.select(composed, "run.allow_targets") or ()
        carried = carried_values(checkpoint, training_record(checkpoint), task, allow)
    if from_hf:
        model = model_from_hf(_hf_directory(path))
        composed = command.over(replace(carried, hf_model=filled(model, path)))
    elif load and "model" not in command.keys:
        defaults = {"model": checkpoint_model(find_checkpoint(load)), **carried.defaults}
        composed = command.over(replace(carried, defaults=defaults))
    elif carried.defaults or carried.values:
        composed = command.over(carried)
    else:
        return composed
    forget_length(composed, carried, command.keys)
    if getattr(task, "path_is_model_path", False) and composed.task.path is None:
        composed.task.path = escape_interpolation(path)
    plain_model(composed)
    return composed


def filled(model: ModelConfig, path: str | None) -> HFModelConfig:
    """Return the node of model=hf with the numbers that `model` has."""
    return HFModelConfig(**{f.name: getattr(model, f.name) for f in fields(ModelConfig)}, path=path)


def plain_model(composed: DictConfig) -> None:
    """Replace a filled node of model=hf by a model without a path, as a preset is."""
    if OmegaConf.get_type(composed, "model") is HFModelConfig:
        numbers = OmegaConf.masked_copy(composed.model, [f.name for f in fields(ModelConfig)])
        composed.model = OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.to_container(numbers))


def _hf_directory(path: str | None) -> Path:
    """Return model.path; UserError where it is no directory."""
    if not path:
        raise UserError("model.path is missing: give a HuggingFace checkpoint, model.path=DIR")
    if not Path(path).is_dir():
        wanted = "give a HuggingFace checkpoint, model.path=DIR"
        raise UserError(f"model.path={path} is no directory: {wanted}{repository_hint(path)}")
    return Path(path)
