"""The config groups as they lie in conf/, and the text of --help."""

from pathlib import Path

import yaml

from dsv3.config import CONF

_TRY = """\
Try:
  python {program}                                          the debug model on the embedded corpus
  python {program} train.steps=1000 optimizer.lr=1e-3       change any number
  python {program} parallel=fsdp launch.nproc=2             two workers on this machine
  python {program} -m optimizer.lr=1e-3,3e-3                a sweep
  python {program} task=plan model=671b parallel=fsdp launch.world_size=2048
  python {program} task=generate checkpoint.load=RUN_DIR task.prompt="import "
  python {program} resume=RUN_DIR                           go on where a run stopped
  python {program} --cfg job                                print the composed config
"""

_CONVERT = """\
usage: python {program} direction=download repo=OWNER/NAME assets=tokenizer|config|weights output=DIR

Fetches files from the HuggingFace hub; the same command goes on with a download that broke off.
Credentials and HF_HUB_OFFLINE come from the environment. revision=TAG picks a version.
"""


LAYOUTS = "layouts"
"""Degrees by model and preset: the choice of the other two decides here, so it is no group of its own."""


def config_groups(conf: Path = CONF) -> dict[str, list[str]]:
    """The choices of every config group, by the files of conf/."""
    groups = {}
    for folder in sorted(path for path in conf.iterdir() if path.is_dir() and path.name != LAYOUTS):
        groups[folder.name] = sorted(path.stem for path in folder.glob("*.yaml"))
    return groups


def train_help(program: str) -> str:
    """What train.py --help prints: usage, groups with their choices and defaults, a few commands."""
    root = yaml.safe_load((CONF / "config.yaml").read_text())
    defaults = {
        key: value for entry in root["defaults"] if isinstance(entry, dict) for key, value in entry.items()
    }
    lines = [
        f"usage: python {program} [-m] [GROUP=CHOICE ...] [KEY=VALUE ...]",
        "",
        "Trains models of the DeepSeek-V3 family. Groups and their choices (* is the default):",
    ]
    for group, choices in config_groups().items():
        marked = [f"{choice}*" if choice == defaults.get(group) else choice for choice in choices]
        lines.append(f"  {group:<12} {' '.join(marked) or '(none yet)'}")
    return "\n".join([*lines, "", _TRY.format(program=program), "Every key: docs/configuration.md"])


def convert_help(program: str) -> str:
    """What convert.py --help prints."""
    return _CONVERT.format(program=program)
