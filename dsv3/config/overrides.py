"""Pass texts, paths and numbers through Hydra's grammar as they were typed, and compose."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from dsv3.config.checkpoint import HF_PREFIX, absolute_path
from dsv3.config.key_types import KeyType, key_types
from dsv3.config.registry import CONF, Stored, described_key, register, register_stored
from dsv3.config.strict import escape_interpolation
from dsv3.errors import UserError

PROMPT = "task.prompt"
"""The text that is passed on whatever it holds, without a word on `${...}`."""

_OVERRIDE = re.compile(r"(?P<prefix>[+~]{0,2})(?P<key>\w[\w./@-]*)=(?P<value>.*)", re.DOTALL)

_QUOTED = r"(?:'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")"


_WHOLE_QUOTE = re.compile(_QUOTED, re.DOTALL)

_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env:\s*([^{},\s]+)\s*(?:,([^{}]*))?\}")

# Numbers that stand alone; those in names, such as `1e3b` and `a.1e3`, do not count.
_NUMBER = re.compile(r"(?<![\w.$-])[+-]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][+-]?\d+)?(?![\w.])")

# No whole number of a config has more digits; 1e999999999 would need a gigabyte.
_MOST_DIGITS = 25


def quote_texts(argv: Sequence[str]) -> list[str]:
    """Return the arguments as Hydra reads what was typed: texts quoted, paths filled in, 1e3 as 1000.

    The type of a key decides (key_types.py). A text that the user has quoted as a whole is left to Hydra.

    Raises:
        UserError: a path names an environment variable that is not set.
    """
    multirun, types = is_multirun(argv), _types(argv)
    return [_quote_argument(argument, types, multirun) for argument in argv]


def literal_notes(argv: Sequence[str]) -> list[str]:
    """Return a line for each typed text with a `${...}` that is no variable, but those characters."""
    types, notes = _types(argv), []
    for key, value in filter(None, map(split_override, argv)):
        rest = (
            _ENVIRONMENT.sub("", value)
            if KeyType.path in types.get(described_key(key), KeyType(0))
            else value
        )
        quoted = _WHOLE_QUOTE.fullmatch(value) or key == PROMPT
        if (
            (kind := types.get(described_key(key)))
            and kind != KeyType.integer
            and "${" in rest
            and not quoted
        ):
            filled = "; of these ${oc.env:NAME} is filled in" if KeyType.path in types[key] else ""
            notes.append(f"{key}={value}: ${{...}} is taken literally{filled}")
    return notes


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
    types = _types(overrides)
    return [_absolute(override, types) for override in overrides]


def job_overrides() -> list[str]:
    """Return the overrides of the job that Hydra runs now, quoted.

    OmegaConf, which holds them, would fill in the ${...} of a text and take away what escapes it.
    """
    overrides = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    assert isinstance(overrides, list)
    return overrides


def as_typed(override: str) -> str:
    """Return a quoted override without its quotes, for a message."""
    start, equals, value = override.partition("=")
    bare = re.sub(_QUOTED, lambda text: _read_text(f"text={text[0]}"), value, flags=re.DOTALL)
    return f"{start}{equals}{bare}"


def typed_text(argument: str) -> str:
    """Return the value of a key of one text as the user means it."""
    return _read_text(_quote_argument(argument, key_types(), multirun=False))


def typed_texts(argument: str) -> list[str]:
    """Return the value of a key of texts as the user means it; none where Hydra will refuse it."""
    quoted = _quote_argument(argument, key_types(), multirun=False)
    try:
        value = OverridesParser.create().parse_override(quoted).value()
    except HydraException:
        return []
    return [str(item) for item in value] if isinstance(value, list) else []


def _types(argv: Sequence[str]) -> dict[str, KeyType]:
    return key_types([pair for pair in map(split_override, argv) if pair])


def _absolute(override: str, types: Mapping[str, KeyType]) -> str:
    found = _OVERRIDE.fullmatch(override)
    if not found:
        return override
    return f"{found['prefix']}{found['key']}={_absolute_value(found['key'], found['value'], types)}"


def _absolute_value(key: str, value: str, types: Mapping[str, KeyType]) -> str:
    kind = types.get(described_key(key), KeyType(0))
    if KeyType.path in kind and value not in ("", "null"):
        how = KeyType.hub_name in kind, key == "checkpoint.load"
        return quote(absolute_path(_read_text(f"{key}={value}"), *how))
    return _read_node(key, value, lambda name, item: _absolute_value(name, item, types))


def _read_text(override: str) -> str:
    """Return the text that Hydra and OmegaConf make of a quoted override."""
    value = OverridesParser.create().parse_override(override).value()
    # The parser keeps the escapes that OmegaConf takes away when it reads the value.
    return str(OmegaConf.create({"text": str(value)}).text)


def _quote_argument(argument: str, types: Mapping[str, KeyType], multirun: bool) -> str:
    found = _OVERRIDE.fullmatch(argument)
    if not found or not found["value"]:
        return argument
    start, key, value = f"{found['prefix']}{found['key']}=", found["key"], found["value"]
    if not multirun:
        return start + _quote_value(key, value, types)
    if described_key(key) not in types and "{" not in value:
        return argument
    chosen = re.fullmatch(r"choice\s*\((.*)\)", value, re.DOTALL)
    parts = [_unpadded(part) for part in split_commas(chosen[1] if chosen else value)]
    swept = ",".join(_quote_value(key, part, types) for part in parts)
    return f"{start}choice({swept})" if chosen else start + swept


def _quote_value(key: str, value: str, types: Mapping[str, KeyType]) -> str:
    """Return one value of `key`, or the value of a whole node, as Hydra reads what was typed."""
    kind, listed = (
        types.get(described_key(key), KeyType(0)),
        re.fullmatch(r"\s*\[(.*)\]\s*", value, re.DOTALL),
    )
    if kind is KeyType.texts and value != "null":
        items = split_commas(listed[1] if listed else value)
        return f"[{','.join(_quote_value('', item.strip(), {'': KeyType.text}) for item in items)}]"
    if value == "null" or _WHOLE_QUOTE.fullmatch(value):
        return value
    if kind is KeyType.integer:
        drawn = re.sub(r"\binterval\s*\([^()]*\)", r"int(\g<0>)", value)  # whole numbers for a search
        return _NUMBER.sub(lambda number: _whole(number[0]), drawn)
    if kind:
        return quote(_filled_in(key, value) if KeyType.path in kind else value)
    return _read_node(key, value, lambda name, item: _quote_value(name, item, types))


def _read_node(key: str, value: str, read: Callable[[str, str], str]) -> str:
    """Return the value of a whole node with each of its values, of a dotted key, as `read` returns it."""
    node = re.fullmatch(r"\{(.*)\}", value, re.DOTALL)
    if not node:
        return value
    pairs = []
    for pair in split_commas(node[1]):
        name, colon, item = pair.strip().partition(":")
        pairs.append(name + colon + read(f"{key}.{name.strip()}", item.strip()))
    return f"{{{','.join(pairs)}}}"


def _unpadded(part: str) -> str:
    """Return a part of a sweep without the spaces around a quoted text or null; other texts keep theirs."""
    bare = part.strip()
    return bare if bare == "null" or _WHOLE_QUOTE.fullmatch(bare) else part


def split_commas(text: str) -> list[str]:
    """Return the parts of `text` between its commas; [] of nothing.

    A part that is quoted as a whole keeps its commas, and so does what stands in brackets, where they pair.
    """
    parts, start, pairs = [], 0, _brackets_pair(text)
    while start < len(text):
        quoted = re.compile(rf"\s*{_QUOTED}\s*(?=,|\Z)", re.DOTALL).match(text, start)
        end = quoted.end() if quoted else _end_of_part(text, start, pairs)
        parts.append(text[start:end])
        start = end + 1
        if start == len(text):  # a comma is the last character
            parts.append("")
    return parts


def _end_of_part(text: str, start: int, pairs: bool) -> int:
    depth = 0
    for place in range(start, len(text)):
        if text[place] == "," and depth == 0:
            return place
        depth += pairs and (text[place] in "([{") - (text[place] in ")]}")
    return len(text)


def _brackets_pair(text: str) -> bool:
    """Return True where every bracket of `text` has its other one."""
    closing, expected = {"(": ")", "[": "]", "{": "}"}, []
    for character in text:
        if character in closing:
            expected.append(closing[character])
        elif character in ")]}" and (not expected or expected.pop() != character):
            return False
    return not expected


def _filled_in(key: str, path: str) -> str:
    """Return a typed path with `~` (behind hf: too) and `${oc.env:NAME}` filled in."""

    def value(found: re.Match[str]) -> str:
        name, default = found[1], found[2]
        if name in os.environ:
            return os.environ[name]
        if default is None:
            raise UserError(f"{key}={path}: the environment variable {name} is not set")
        return default.strip().strip("'\"")

    filled = _ENVIRONMENT.sub(value, path)
    kind = HF_PREFIX if filled.startswith(f"{HF_PREFIX}~") else ""
    # The shell leaves the ~ of key=~/path alone; Path's own expanduser fails without a home.
    return kind + os.path.expanduser(filled.removeprefix(kind))  # noqa: PTH111


def _whole(number: str) -> str:
    """Return a number without point and exponent where it is whole, else as it was typed."""
    if number.lstrip("+-").replace("_", "").isdigit():
        return number
    read = Decimal(number.replace("_", ""))
    whole = read.adjusted() < _MOST_DIGITS and read == read.to_integral_value()
    return str(int(read)) if whole else number


def compose(
    overrides: Sequence[str], search: Sequence[str] = (), root: str = "config", stored: Stored | None = None
) -> DictConfig:
    """Compose conf/ROOT.yaml under quoted `overrides`, outside of a command or in a job; Hydra's errors pass.

    `search` are the URLs of a user's config directories. `stored` has values to take in place of the root's
    defaults.
    """
    running = GlobalHydra.instance().hydra  # of the job, which would refuse a second one
    GlobalHydra.instance().clear()
    register()
    try:
        if stored is not None:
            root = register_stored(root, stored)
        folders = [f"hydra.searchpath=[{','.join(map(quote, search))}]"] if search else []
        with initialize_config_dir(str(CONF), version_base=None):
            return hydra_compose(root, [*overrides, *folders])
    finally:
        GlobalHydra.instance().hydra = running
        register()  # the values of one checkpoint are no defaults of the next command
