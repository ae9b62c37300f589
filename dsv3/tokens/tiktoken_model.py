"""Convert the tokenizer of a tiktoken release (Moonlight, Kimi) to the `tokenizers` library, id for id.

Such a release has no tokenizer.json. Its tiktoken.model lists byte strings with their ranks, which are their
ids. The rules stand in its own Python file: the pattern that cuts a text into pieces (`pat_str`) and the
number of reserved ids. That file is parsed and never run. What else it does to a text is not done here: the
releases cut texts of more than 400,000 characters, and runs of more than 25,000, before they encode them.

tiktoken takes a piece as one token where the list has it, and else merges the neighbours whose concatenation
has the lowest rank, the leftmost of them first. The library's BPE does the same: `ignore_merges` is the first
half, and the merges of all pairs by the rank of what they make the second. Where a token can be made of
several pairs the library prefers one of them and tiktoken the leftmost; but until a neighbour takes a byte
away, merging goes on inside the bytes of a token as if they stood alone, and so there is only one of these
pairs that ever comes up.
"""

import ast
import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from dsv3.errors import UserError, quoted
from dsv3.untrusted_files import read_bytes, read_text, refuse_lfs_pointer

_LINE = re.compile(rb"(\S+) (\d{1,9})\s*")

_MODULE = re.compile(r"\w{1,100}")

_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


@dataclass(frozen=True)
class Rules:
    """The rules in the Python file of a release."""

    pattern: str
    """Regular expression of the pieces of a text."""
    reserved: int | None
    """Ids after those of tiktoken.model that are set aside for special tokens; None where it does not say."""


def convert_tiktoken(file: Path, config: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer of a tiktoken.model and the Python file beside it.

    Special tokens have the names that `config`, the content of tokenizer_config.json, gives their ids.
    UserError for a file that is damaged, for rules that are missing or not written as plain text, and for
    named ids that are not the ones after those of tiktoken.model, as where that file was cut off.
    """
    ranks = _read_ranks(file)
    rules = _read_rules(file, config)
    characters = _byte_characters()

    def text(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    merges = [(text(left), text(right)) for left, right in _merges(ranks)]
    vocabulary = {text(token): rank for token, rank in ranks.items()}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    try:
        pieces = pre_tokenizers.Split(Regex(rules.pattern), "isolated")
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{file.parent}: the pattern pat_str is not one that can be read: {error}") from None
    rows = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pieces, rows])
    backend.decoder = decoders.ByteLevel()
    tokens = _special_tokens(file, len(ranks), rules.reserved, config)
    backend.add_tokens(list(tokens.values()))
    for index, token in tokens.items():
        if backend.token_to_id(token.content) != index:
            raise UserError(
                f"{file.parent}: the id {index} of {quoted(token.content)} has another name already"
            )
    return backend


def _read_ranks(file: Path) -> dict[bytes, int]:
    """Return the tokens of a tiktoken.model with their ranks 0, 1, 2, ...; UserError for anything else."""
    refuse_lfs_pointer(file)
    ranks: dict[bytes, int] = {}
    try:
        for number, line in enumerate(read_bytes(file, "tokenizer").splitlines(), start=1):
            found = _LINE.fullmatch(line)
            if found is None or int(found[2]) != len(ranks):
                raise ValueError(f"line {number} is not a token and the rank {len(ranks)}")
            ranks[base64.b64decode(found[1], validate=True)] = len(ranks)
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            raise ValueError(f"it has no token for {len(missing)} of the 256 bytes")
    except (OSError, ValueError, binascii.Error) as error:
        raise UserError(f"{file} is not a list of tokens that can be read: {error}") from None
    return ranks


def _merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Yield every way to make a token of two others, by the token's rank."""
    for token in ranks:  # by rank
        for cut in range(1, len(token)):
            if token[:cut] in ranks and token[cut:] in ranks:
                yield token[:cut], token[cut:]


def _byte_characters() -> list[str]:
    """Return the character that stands for each byte in a byte-level vocabulary, as in GPT-2's.

    Printable characters of Latin-1 stand for themselves, and the others, in order, for those from 256 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _special_tokens(
    file: Path, first: int, reserved: int | None, config: Mapping[str, Any]
) -> dict[int, AddedToken]:
    """Return the tokens after those of tiktoken.model by id; one that has no name is a reserved one."""
    named = {int(index): told for index, told in (config.get("added_tokens_decoder") or {}).items()}
    count = len(named) if reserved is None else reserved
    ids = range(first, first + count)
    for index in sorted(named):
        if index not in ids:
            told = f"the ids {first} to {first + count - 1}" if count else "no ids"
            raise UserError(
                f"{file} has {first} tokens and leaves {told} for names, but the files beside it name the id "
                f"{index}, {quoted(named[index]['content'])}: it is cut off, or they are of another release; "
                "fetch them anew, convert.py direction=download assets=tokenizer"
            )
    tokens = {}
    for index in ids:
        told = named.get(index, {"content": f"<|reserved_token_{index}|>", "special": True})
        tokens[index] = added_token(told)
    return tokens


def added_token(told: Mapping[str, Any]) -> AddedToken:
    """Return an entry of added_tokens_decoder as the library's token, with the flags that it has."""
    flags = {flag: bool(told[flag]) for flag in _FLAGS if flag in told}
    return AddedToken(str(told["content"]), **{"normalized": not flags.get("special", False), **flags})


def _read_rules(file: Path, config: Mapping[str, Any]) -> Rules:
    """Return the rules of the release's Python file, which is parsed and never run."""
    classes = config.get("auto_map")
    told = classes.get("AutoTokenizer") if isinstance(classes, dict) else None
    first = next(iter(told), "") if isinstance(told, list) else told
    name = str(first or "").rpartition("--")[2].partition(".")[0]
    if name and not _MODULE.fullmatch(name):
        config_file = file.with_name("tokenizer_config.json")
        raise UserError(f"{config_file}: auto_map names no Python file: {quoted(told)}")
    candidates = [file.with_name(f"{name}.py")] if name else sorted(file.parent.glob("tokenization_*.py"))
    sources = [path for path in candidates if path.is_file()]
    if not sources:
        wanted = f"{name}.py" if name else "tokenization_*.py"
        raise UserError(
            f"{file} needs the rules of its release, {wanted}, which is not beside it: "
            "fetch it (it is read, never run), convert.py direction=download assets=tokenizer"
        )
    for path in sources:
        refuse_lfs_pointer(path)
        try:
            tree = ast.parse(read_text(path))
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise UserError(f"{path} is not Python that can be read: {error}") from None
        pattern = _plain_text(dict(_assigned(tree)).get("pat_str"))
        if pattern:
            return Rules(pattern, _read_count(path, tree))
    raise _not_plain(sources[0], "its pattern pat_str as plain text")


_RESERVED = "num_reserved_special_tokens"


def _read_count(path: Path, tree: ast.Module) -> int | None:
    """Return the number of reserved ids, None where the file has none; UserError where it is computed."""
    stores = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Name | ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and (node.id if isinstance(node, ast.Name) else node.attr) == _RESERVED
    ]
    if not stores:
        return None
    values = [value for name, value in _assigned(tree) if name == _RESERVED]
    numbers = [value.value for value in values if isinstance(value, ast.Constant)]
    number = numbers[0] if numbers else None
    if type(number) is not int or len(numbers) != len(stores) or numbers != [number] * len(numbers):
        raise _not_plain(path, f"{_RESERVED} as a plain number")
    return number


def _not_plain(path: Path, what: str) -> UserError:
    """Return the error for a rule that would have to be computed."""
    return UserError(
        f"{path} does not give {what}, and code of a release is never run: "
        "convert it to a tokenizer.json elsewhere and give that, tokenizer=local tokenizer.path=PATH"
    )


def _assigned(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """Yield the names that a module or its classes assign, with the expression."""
    for node in (inner for each in tree.body for inner in (each, *getattr(each, "body", []))):
        if isinstance(node, ast.Assign):
            yield from ((name.id, node.value) for name in node.targets if isinstance(name, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            yield node.target.id, node.value


def _plain_text(value: ast.expr | None) -> str | None:
    """Return the string that an expression of literals gives: one string, or `"...".join([...])`."""
    if isinstance(value, ast.Constant):
        return value.value if isinstance(value.value, str) else None
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "join":
        between, lists = (
            _plain_text(value.func.value),
            [a for a in value.args if isinstance(a, ast.List | ast.Tuple)],
        )
        texts = (
            [_plain_text(each) for each in lists[0].elts] if len(lists) == len(value.args) == 1 else [None]
        )
        if between is not None and None not in texts:
            return between.join(text for text in texts if text is not None)
    return None
