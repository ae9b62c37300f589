"""Moves models between formats and places: `python convert.py --help` says how."""

import sys

import hydra
from omegaconf import DictConfig

from dsv3.cli.application import Application
from dsv3.cli.help import convert_help
from dsv3.config.overrides import quote_texts
from dsv3.convert.request import prepare_conversion


def carry_out(composed: DictConfig) -> None:
    """Check the config and do what its direction says."""
    config = prepare_conversion(composed)
    from dsv3.convert.convert import convert  # imports torch: not for a mistake that is found without it

    print(convert(config))


application = Application("convert.py", convert_help, quote_texts, carry_out)


@hydra.main(version_base=None, config_path="conf", config_name="convert")
def main(config: DictConfig) -> float | None:
    """One conversion."""
    return application.job(config)


if __name__ == "__main__":
    sys.exit(application.run(main, sys.argv[1:]))
