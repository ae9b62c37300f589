"""Use dsv3 from Python: compose a config, build its model, load weights into it (docs/library.md)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from dsv3.cli.error_messages import explain_error
from dsv3.config.overrides import override_key, quote_texts
from dsv3.config.registry import CONF, config_groups, register
from dsv3.config.root import Config
from dsv3.config.strict import strict
from dsv3.errors import UserError
from dsv3.launch.prepare import resolve_model

if TYPE_CHECKING:
    import torch

    from dsv3.model.transformer import Transformer


def compose(overrides: Sequence[str] = ()) -> Config:
    """Return the checked config under `overrides`, as train.py's command line would read them.

    Raises:
        UserError: an override is wrong, in the words of the command line.
    """
    register()
    try:
        with initialize_config_dir(str(CONF), version_base=None):
            composed = hydra_compose("config", quote_texts(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain_error(error, overrides, config_groups())) from None
    resolve_model(composed, {override_key(override) for override in overrides})
    config: Config = strict(composed)
    return config


def load_model(config: Config, device: "torch.device | str" = "cpu") -> "Transformer":
    """Return the configured model in evaluation mode, with the weights of checkpoint.load or fresh ones.

    Raises:
        UserError: the checkpoint is damaged, or is of another model.
    """
    import torch  # composing alone does without it

    from dsv3.checkpoint.directory import find_checkpoint
    from dsv3.checkpoint.load import load_weights, require_weights
    from dsv3.parallel.parallelize import build_model

    checkpoint = find_checkpoint(config.checkpoint.load) if config.checkpoint.load else None
    if checkpoint is not None:
        require_weights(config.model, checkpoint)
    model = build_model(config, None, torch.device(device))
    if checkpoint is not None:
        load_weights([model], checkpoint)
    return model.eval()
