"""The files that belong to a tokenizer, by the names under which HuggingFace tokenizers look for them.

They travel together and unchanged: from a download or a checkpoint into a run, and from there into every
export. Code among them is copied and never run. The ids stand in one of them, a tokenizer.json or a
tiktoken.model; the others name special tokens and say what ends a text.
"""

import json
import shutil
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from dsv3.errors import UserError, quoted, repository_hint
from dsv3.untrusted_files import MissingFile, read_json, refuse_lfs_pointer

TOKENIZER_JSON, TIKTOKEN_MODEL = "tokenizer.json", "tiktoken.model"
READABLE = (TOKENIZER_JSON, TIKTOKEN_MODEL)
"""The files that ids are read from; the first is taken where both are there."""

TOKENIZER_PATTERNS = (
    "tokenizer*",  # tokenizer.json, tokenizer_config.json, tokenizer.model of sentencepiece
    "tokenization_*.py",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "*tiktoken*",
    "*.tekken",
    "tekken.json",
    "vocab*",
    "merges*",
    "spiece.model",
    "sentencepiece*.model",
    "*.bpe.model",
)
"""Paths of a tokenizer's files below the folder of a checkpoint, as fnmatch and huggingface_hub match."""


def is_tokenizer_file(name: str) -> bool:
    """Return whether a path, relative to the folder of a checkpoint, belongs to its tokenizer."""
    return any(fnmatchcase(name, pattern) for pattern in TOKENIZER_PATTERNS)


def tokenizer_files(folder: Path) -> Iterator[Path]:
    """Yield the files of the tokenizer in a folder, also those in its folder of templates."""
    for path in sorted((*folder.glob("*"), *folder.glob("additional_chat_templates/*"))):
        if path.is_file() and is_tokenizer_file(path.relative_to(folder).as_posix()):
            yield path


def copy_tokenizer_files(source: Path, target: Path) -> None:
    """Copy the files of a tokenizer from one folder to another, byte for byte; of a link what it leads to.

    UserError, before the first copy, for one that is a Git-LFS pointer.
    """
    files = list(tokenizer_files(source))
    for path in files:
        refuse_lfs_pointer(path)
    for path in files:
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


_UNREADABLE = {
    "*.model": "a SentencePiece vocabulary",
    "*tekken*": "a Tekken vocabulary",
    "*tiktoken*": "a tiktoken vocabulary of another name",
    "vocab*": "the vocabulary of a slow tokenizer",
    "tokenization_*.py": "code",
    "tokenizer_config.json": "a tokenizer_config.json alone",
}
"""Files of a tokenizer whose ids dsv3 does not read, the telling ones first."""


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder has a tokenizer, of a kind that is read here or of another."""
    return any(_find(folder, pattern) for pattern in (*READABLE, *_UNREADABLE))


def has_vocabulary(folder: Path) -> bool:
    """Return whether a folder has a file that ids could be read from, here or by another program."""
    rest = {"tokenizer_config.json", "tokenization_*.py"}
    return any(_find(folder, pattern) for pattern in (*READABLE, *(_UNREADABLE.keys() - rest)))


def vocabulary_file(path: str | Path) -> Path:
    """Return the file with the ids: `path` itself, or the one in the directory `path`.

    UserError, with the way on, where there is none or one of a kind that is not read.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        found = next((place / name for name in READABLE if (place / name).is_file()), None)
    else:
        found = place if place.is_file() and (place.suffix == ".json" or place.name in READABLE) else None
    if found is None:
        raise UserError(_way_on(place))
    refuse_lfs_pointer(found)
    return found


def _way_on(place: Path) -> str:
    """Return what to do where a file or directory has no ids that can be read."""
    needed = f"a {TOKENIZER_JSON} or a {TIKTOKEN_MODEL}, or a directory that holds one, is needed"
    if not place.exists():
        return f"{place} does not exist: {needed}{repository_hint(str(place))}"
    folder = place if place.is_dir() else place.parent
    files = [folder / name for pattern in _UNREADABLE for name in _find(folder, pattern)]
    file = place if place.is_file() else next(iter(files), None)
    if file is None:
        return f"{place} holds no tokenizer: {needed}"
    refuse_lfs_pointer(file)
    kind = next(
        (told for name, told in _UNREADABLE.items() if fnmatchcase(file.name, name)), "a file of its own kind"
    )
    begins = f"{file}: {kind} is no tokenizer that dsv3 reads"
    if file.name == "tokenizer_config.json":
        return f"{begins}: fetch the files beside it, convert.py direction=download assets=tokenizer"
    if kind == "code":
        give = f"give its {TOKENIZER_JSON}, tokenizer=local tokenizer.path=PATH"
        return f"{begins}, code of a release is never run: {give}"
    written = f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained('OUT')"
    command = f'python -c "from transformers import AutoTokenizer; {written}"'
    return f"{begins}: write a {TOKENIZER_JSON}, {command}, and give it, tokenizer=local tokenizer.path=OUT"


def _find(folder: Path, pattern: str) -> list[str]:
    """Return the names in a folder that match, in order."""
    return sorted(path.name for path in folder.glob(pattern) if path.is_file())


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """Return tokenizer_config.json's content, completed from special_tokens_map.json and added_tokens.json.

    Those two count, as in transformers, only where tokenizer_config.json does not list the added tokens
    itself.
    UserError for a file that is damaged.
    """
    config = read_object(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config |= read_object(folder / "special_tokens_map.json")
        special = {token_name(value) for key, value in config.items() if key.endswith("_token")}
        more = config.get("additional_special_tokens")
        special |= {token_name(value) for value in (more if isinstance(more, list) else [])}
        added = {
            str(index): {"content": name, "special": name in special}
            for name, index in read_object(folder / "added_tokens.json").items()
        }
        config |= {"added_tokens_decoder": added} if added else {}
    listed = config.get("added_tokens_decoder", {})
    try:
        sound = all(int(index) >= 0 and isinstance(told["content"], str) for index, told in listed.items())
    except (AttributeError, KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise UserError(
            f"{folder}: the added tokens of tokenizer_config.json or added_tokens.json are no ids and names"
        )
    return config


def token_name(value: Any) -> str | None:
    """Return the text of a special token, which stands in the files as such or as an object with flags."""
    name = value.get("content") if isinstance(value, dict) else value
    return name if isinstance(name, str) else None


def read_stop_ids(folder: Path) -> list[int]:
    """Return the ids that end a generated text, by generation_config.json, else by config.json.

    The first file that has the key counts, also with null. An empty list where neither has it; UserError
    where they say something else than ids.
    """
    for name in ("generation_config.json", "config.json"):
        found = read_object(folder / name)
        if "eos_token_id" in found:
            told = found["eos_token_id"]
            ids = told if isinstance(told, list) else [] if told is None else [told]
            if not all(type(index) is int and index >= 0 for index in ids):
                raise UserError(
                    f"{folder / name}: eos_token_id={quoted(told)} is neither an id nor a list of ids"
                )
            return ids
    return []


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, an empty one where it is missing; UserError for anything else."""
    try:
        refuse_lfs_pointer(path)
        found = read_json(path)
    except MissingFile:
        if path.is_symlink():  # a download that is not complete
            raise
        return {}
    if not isinstance(found, dict):
        raise UserError(f"{path} is no JSON object: it may be damaged")
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{path} holds half of a surrogate pair, no character: it may be damaged") from None
    return found
