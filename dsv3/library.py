"""Use dsv3 from Python: compose a config, build its model, load weights into it (docs/library.md)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from dsv3.cli.arguments import import_user_modules
from dsv3.cli.error_messages import explain_error, root_groups
from dsv3.cli.flags import user_config_dir
from dsv3.cli.user_files import UserFiles
from dsv3.config.overrides import compose as compose_overrides
from dsv3.config.overrides import quote_texts
from dsv3.config.root import Config
from dsv3.config.strict import strict
from dsv3.errors import UserError
from dsv3.launch.checkpoint_defaults import Composition, compose_over_checkpoint, stored_model_notes

if TYPE_CHECKING:
    import torch

    from dsv3.model.transformer import Transformer


def compose(overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> Config:
    """Return the checked config under `overrides`, as train.py's command line would read them.

    `config_dir` holds presets and studies of your own, as --config-dir does. A run is resumed by the command.

    Raises:
        UserError: an override is wrong, in the words of the command line.
    """
    if isinstance(overrides, str):
        raise TypeError(f"overrides is a list of strings: compose([{overrides!r}])")
    import_user_modules(overrides)
    own = user_config_dir([] if config_dir is None else [f"--config-dir={config_dir}"])
    command = Composition(quote_texts(overrides), [] if own is None else [f"file://{own}"])
    try:
        composed = compose_over_checkpoint(compose_overrides(command.overrides, command.search), command)
    except (HydraException, OmegaConfBaseException) as error:
        files = UserFiles(overrides, own)
        raise UserError(explain_error(error, overrides, root_groups("config", files), files)) from None
    config: Config = strict(composed, composed.run.allow_targets)
    stored_model_notes(config, command)  # refuses what the caller has not set by its own key
    return config


def load_model(config: Config, device: "torch.device | str" = "cpu") -> "Transformer":
    """Return the configured model in evaluation mode, with the weights of checkpoint.load or fresh ones.

    Raises:
        UserError: the checkpoint is damaged, or is of another model.
    """
    import torch  # composing alone does without it

    from dsv3.distributed.process_group import RankContext
    from dsv3.tasks.setup import load_parts

    alone = RankContext(rank=0, local_rank=0, world=1, device=torch.device(device))
    config = replace(config, precision=config.precision.on(alone.device.type))
    (model,) = load_parts(config, None, alone).model_parts
    return model.eval()
