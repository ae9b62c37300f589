"""Pass paths and prompts through Hydra's grammar unchanged, read stored overrides, and compose."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf

from dsv3.config.checkpoint import HF_PREFIX
from dsv3.config.registry import CONF, register
from dsv3.config.strict import escape_interpolation

TEXT_KEYS = frozenset(
    {"task.prompt", "task.runs", "task.output", "resume", "input", "output", "run.dir"}
    | {"checkpoint.load", "data.path", "model.path", "tokenizer.path", "launch.sbatch", "launch.time"}
)
"""Keys whose values people type as they are: paths and prompts."""

PATH_KEYS = frozenset({"data.path", "data.cache_dir", "model.path", "tokenizer.path", "checkpoint.load"})
"""Keys whose relative paths a stored run could not find from another directory."""

_OVERRIDE = re.compile(r"(?P<prefix>[+~]{0,2})(?P<key>\w[\w./@-]*)=(?P<value>.*)", re.DOTALL)

_QUOTED = r"(?:'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")"


def quote_texts(argv: Sequence[str]) -> list[str]:
    """Return the arguments with paths and prompts quoted, so that Hydra reads them as they were typed."""
    multirun = is_multirun(argv)
    return [_quote_argument(argument, multirun) for argument in argv]


def is_multirun(argv: Sequence[str]) -> bool:
    """Return True for a Hydra sweep."""
    return "-m" in argv or "--multirun" in argv


def split_override(argument: str) -> tuple[str, str] | None:
    """Return key (without + or ~) and value of `key=value`; None for flags and anything else."""
    found = _OVERRIDE.fullmatch(argument)
    return (found["key"], found["value"]) if found else None


def override_key(argument: str) -> str:
    """Return the key that an argument sets, or the argument itself."""
    pair = split_override(argument)
    return pair[0] if pair else argument


def quote(value: str) -> str:
    """Return `value` quoted so that Hydra's grammar and OmegaConf's interpolation give back exactly it."""
    return str(QuotedString(escape_interpolation(value), Quote.single).with_quotes())


def absolute_paths(overrides: Sequence[str]) -> list[str]:
    """Return overrides as a run stores them: with absolute paths, which a resume from elsewhere finds."""
    return [_absolute(override) for override in overrides]


def _absolute(override: str) -> str:
    found = _OVERRIDE.fullmatch(override)
    if not found or found["key"] not in PATH_KEYS or found["value"] in ("", "null"):
        return override
    text = _read_text(override)
    kind = HF_PREFIX if found["key"] == "checkpoint.load" and text.startswith(HF_PREFIX) else ""
    path = Path(text.removeprefix(kind)).absolute()
    return f"{found['prefix']}{found['key']}={quote(f'{kind}{path}')}"


def typed_text(argument: str) -> str:
    """Return the value of an argument of TEXT_KEYS as the user means it."""
    return _read_text(_quote_argument(argument, multirun=False))


def _read_text(override: str) -> str:
    """Return the text that Hydra and OmegaConf make of a quoted override."""
    value = OverridesParser.create().parse_override(override).value()
    # The parser keeps the escapes that OmegaConf takes away when it reads the value.
    return str(OmegaConf.create({"text": str(value)}).text)


def _quote_argument(argument: str, multirun: bool) -> str:
    found = _OVERRIDE.fullmatch(argument)
    if not found or found["key"] not in TEXT_KEYS or found["value"] in ("", "null"):
        return argument
    parts = [found["value"]]
    if multirun:  # a quoted part of a sweep keeps its commas
        parts = re.findall(rf"{_QUOTED}(?=,|\Z)|[^,]+", found["value"], re.DOTALL)
    if found["key"] != "task.prompt":  # the shell leaves the ~ of key=~/path alone
        parts = [os.path.expanduser(part) for part in parts]  # noqa: PTH111  # Path's fails without a home
    # A part that the user has quoted as a whole for Hydra stays.
    quoted = (
        part if part == "null" or re.fullmatch(_QUOTED, part, re.DOTALL) else quote(part) for part in parts
    )
    return f"{found['prefix']}{found['key']}={','.join(quoted)}"


def compose(overrides: Sequence[str], own: Path | None = None, root: str = "config") -> DictConfig:
    """Compose conf/ROOT.yaml under quoted `overrides`, outside of a command; Hydra's errors pass.

    `own` is a user's config directory.
    """
    register()
    search = [] if own is None else [f"hydra.searchpath=[{quote(f'file://{own}')}]"]
    with initialize_config_dir(str(CONF), version_base=None):
        return hydra_compose(root, [*overrides, *search])
