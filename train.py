"""Trains, evaluates, plans and samples: `python train.py --help` says how."""

import sys

import hydra
from omegaconf import DictConfig

from dsv3.cli.application import Application
from dsv3.cli.arguments import prepare
from dsv3.cli.help import train_help
from dsv3.launch.launch import carry_out

application = Application("train.py", train_help, prepare, carry_out)


@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(config: DictConfig) -> float | None:
    """One job: what Hydra composed, checked and carried out; a sweep's objective is the result."""
    return application.job(config)


if __name__ == "__main__":
    sys.exit(application.run(main, sys.argv[1:]))
