"""Use dsv3 from Python: compose a config, build its model, load weights into it (docs/library.md)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from dsv3.cli.arguments import import_user_modules, user_config_dir
from dsv3.cli.error_messages import explain_error
from dsv3.config.overrides import compose as compose_overrides
from dsv3.config.overrides import override_key, quote_texts
from dsv3.config.registry import config_groups
from dsv3.config.root import Config
from dsv3.config.strict import strict
from dsv3.errors import UserError
from dsv3.launch.prepare import resolve_model

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
    try:
        composed = compose_overrides(quote_texts(overrides), own)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain_error(error, overrides, config_groups())) from None
    resolve_model(composed, {override_key(override) for override in overrides})
    config: Config = strict(composed, composed.run.allow_targets)
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
    (model,) = load_parts(config, None, alone).model_parts
    return model.eval()
