"""Open and parse the files that a stranger may have written: regular files only, under limits.

Everything that comes from outside goes through here: checkpoints, releases, run directories, presets of the
user's own, plans, caches. A file of another kind (a pipe, a device, a directory) is refused before a byte of
it is read, and no size that a file claims is believed. What is wrong is a BadFile: one line, for exit code 2.
"""

import errno
import json
import os
import stat
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from dsv3.errors import UserError, quoted


@dataclass(frozen=True)
class Limits:
    """The most that a file may ask of memory and time before it is refused."""

    nbytes: int
    """Bytes of the file."""
    nodes: int = 0
    """Values, keys and containers together; an alias of YAML counts as often as it is used."""
    depth: int = 64
    """Containers around a value. Python gives up near 1,000, and in C without a word."""


LIMITS = {
    "yaml": Limits(2**20, 100_000),
    "json": Limits(2**24, 1_000_000),
    "listing": Limits(100_000_000, 8_000_000),
    "tokenizer": Limits(2**28, 16_000_000),
    "text": Limits(2**24),
    "rows": Limits(2**32),
    "pickle": Limits(2**32),
}
"""By kind of file. yaml: a config, a preset. json: one object of settings. listing: an index, a header or a
manifest with a line per tensor or file. tokenizer: tokenizer.json, a vocabulary. text: other small texts.
rows: metrics.jsonl and other journals of a run. pickle: .metadata of a checkpoint. docs/reliability.md lists
them."""

LONGEST_NUMBER = 100
"""Characters of a number. tokenizer_config.json of some releases has 10^30 for "no limit"."""

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


class BadFile(UserError, ValueError):
    """A file that is not a regular one, is too large, or does not hold what it should.

    A ValueError too, so that readers with words of their own for damage catch it as they do that of a parser.
    """

    def __init__(self, path: Path | str, reason: str) -> None:
        shown = "".join(char if char.isprintable() else "\ufffd" for char in str(path))
        shown = shown if len(shown) <= 200 else f"{shown[:100]}...{shown[-90:]}"
        super().__init__(f"{shown} {reason}")
        self.path, self.reason = Path(path), reason
        """The reason goes on behind the path: `is a pipe, not a file`."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Let it come back from another process as it was."""
        return type(self), (self.path, self.reason)


class MissingFile(BadFile, FileNotFoundError):
    """A file that is not there; a FileNotFoundError too."""


def open_descriptor(path: Path | str) -> int:
    """Return a descriptor for reading a regular file; links are followed. The caller closes it.

    Raises:
        MissingFile: there is none.
        BadFile: it is something else than a regular file, or cannot be opened.
    """
    try:
        # Before it is opened: opening a device may already do something.
        _require_regular(path, os.stat(path))  # noqa: PTH116  # a str may be a name that Path would change
        # Without O_NONBLOCK a pipe that has taken the file's place would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        if isinstance(error, BadFile):
            raise
        raise _unopened(path, error) from None
    try:
        _require_regular(path, os.fstat(descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_file(path: Path | str) -> IO[bytes]:
    """Return a regular file open for reading; errors as of `open_descriptor`."""
    return os.fdopen(open_descriptor(path), "rb")


def read_bytes(path: Path | str, kind: str = "json") -> bytes:
    """Return the content of a regular file of at most the bytes that LIMITS[kind] allows.

    Errors as of `open_descriptor`, and BadFile for a file that is larger or cannot be read.
    """
    limit = LIMITS[kind].nbytes
    with open_file(path) as file:
        try:
            # The size is asked first so that nothing is read in vain; /proc says 0 and the file may grow.
            size = os.fstat(file.fileno()).st_size
            content = file.read(limit + 1) if size <= limit else b""
        except OSError as error:
            raise BadFile(path, f"cannot be read: {error.strerror or error}") from None
    if max(size, len(content)) > limit:
        raise BadFile(path, f"has {max(size, len(content)):,} bytes, at most {limit:,} are read of its kind")
    return content


def read_text(path: Path | str, kind: str = "text", errors: str = "strict") -> str:
    """Return a file's content as UTF-8; errors as of `read_bytes`, and BadFile where it is none."""
    return _decoded(read_bytes(path, kind), path, errors)


def read_json(path: Path | str, kind: str = "json") -> Any:
    """Return the JSON of a file; errors as of `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path, kind), path, kind)


def parse_json(content: bytes | str, path: Path | str, kind: str = "json", unique_keys: bool = False) -> Any:
    """Return the JSON in `content`, which came from `path`.

    BadFile for what is no JSON, is nested too deeply, or has more values than LIMITS[kind] allows; with
    `unique_keys` also for a key that an object has twice, of which the last would win.
    """
    limits = LIMITS[kind]
    text = _decoded(content, path) if isinstance(content, bytes) else content
    # Each value but the first has a comma or a bracket in front, each key a colon behind.
    if len(text) > limits.nodes and sum(map(text.count, ",[{:")) > limits.nodes:
        raise BadFile(path, f"holds more than {limits.nodes:,} values, more than any file of its kind")
    hook = _unique_keys if unique_keys else None
    try:
        value = json.loads(text, parse_int=_whole_number, object_pairs_hook=hook)
    except RecursionError:
        raise BadFile(path, "is nested too deeply") from None
    except _DuplicateKey as error:
        raise BadFile(path, f"has {quoted(error.args[0])} twice") from None
    except ValueError as error:
        raise BadFile(path, f"is not JSON: {error}") from None
    _require_depth(value, limits.depth, path)
    return value


def read_yaml(path: Path | str) -> Any:
    """Return the YAML of a file; errors as of `read_bytes` and `parse_yaml`."""
    return parse_yaml(read_text(path, "yaml"), path)


def parse_yaml(text: str, path: Path | str) -> Any:
    """Return the YAML in `text`, which came from `path`, as yaml.safe_load would, but for dates.

    These are texts, as Hydra reads them, so a value is one that JSON has. BadFile for what is no YAML, passes
    the limits, or has another tag than those of such values.
    """
    try:
        return _BoundedLoader(text).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _no_yaml(error, path) from None


def compose_yaml(path: Path | str) -> yaml.Node | None:
    """Return the nodes of a YAML file with their lines; errors as of `read_yaml`."""
    text = read_text(path, "yaml")
    try:
        node: yaml.Node | None = _BoundedLoader(text).get_single_node()
        return node
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _no_yaml(error, path) from None


def require_bounded_yaml(path: Path | str) -> None:
    """Raise BadFile unless a file may be handed to another reader of YAML.

    It is a regular file within the bytes, depth and values that LIMITS allow, those that aliases stand for
    included, and its tags are those that `parse_yaml` reads. A text that is no YAML passes: that reader will
    tell. Of a value that does not suit its tag it would repeat an error of PyYAML's insides.
    """
    text = read_text(path, "yaml", errors="replace")
    try:
        _BoundedLoader(text).get_single_data()
    except (_Refused, RecursionError) as error:
        raise _no_yaml(error, path) from None
    except (yaml.YAMLError, ValueError):
        return


def require_no_pipes(directory: Path) -> None:
    """Raise BadFile for a pipe, device or socket in a directory in which a command is going to write.

    A log or a journal that is appended to would wait for its reader, or write into the device.
    """
    with os.scandir(directory) as entries:
        for entry in entries:
            with suppress(FileNotFoundError, NotADirectoryError):  # a link that leads nowhere
                try:
                    mode = entry.stat().st_mode
                except OSError as error:
                    raise _unopened(entry.path, error) from None
                if not stat.S_ISDIR(mode):
                    _require_regular(entry.path, entry.stat())


def refuse_lfs_pointer(path: Path) -> None:
    """Raise UserError where a file of a release is the Git-LFS pointer that a clone without LFS leaves.

    Reads 48 bytes. Call it before a file of a HuggingFace directory is parsed, whatever its kind. Other
    errors as of `open_descriptor`.
    """
    with open_file(path) as file:
        is_pointer = file.read(48).startswith(b"version https://git-lfs.github.com/spec/v")
    if is_pointer:
        raise UserError(
            f"{path} is a Git-LFS pointer, not the file itself: fetch it with `git lfs pull`, "
            "or the repository anew with convert.py direction=download"
        )


def _require_regular(path: Path | str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        found = _KINDS.get(stat.S_IFMT(status.st_mode), "of an unknown kind")
        raise BadFile(path, f"is {found}, not a file")


def _unopened(path: Path | str, error: OSError | ValueError) -> BadFile:
    """Return the error for a path that the system does not open."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        with suppress(OSError):
            link = os.readlink(path)  # noqa: PTH115
            text = f"is a link to {quoted(link)}, which is not there: the download may be incomplete"
            return MissingFile(path, text)
        return MissingFile(path, "does not exist")
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        return BadFile(path, "is a link that leads back to itself")
    return BadFile(path, f"cannot be opened: {getattr(error, 'strerror', None) or error}")


def _decoded(content: bytes, path: Path | str, errors: str = "strict") -> str:
    try:
        return content.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise BadFile(path, f"is not UTF-8 at byte {error.start}") from None


def _whole_number(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


class _DuplicateKey(ValueError):
    """A JSON object has a key twice."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise _DuplicateKey(next(key for key, count in counts.items() if count > 1))
    return found


def _require_depth(value: Any, depth: int, path: Path | str) -> None:
    """Raise BadFile unless at most `depth` containers are around every value."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(depth):
        level = [
            item
            for node in level
            for item in (node.values() if isinstance(node, dict) else node)
            if isinstance(item, dict | list)
        ]
        if not level:
            return
    raise BadFile(path, f"is nested more than {depth} deep")


_TAG = "tag:yaml.org,2002:"

_INT, _DATE = f"{_TAG}int", f"{_TAG}timestamp"

_TAGS: dict[type[yaml.Event], set[str | None]] = {
    yaml.ScalarEvent: {None, "!", *(f"{_TAG}{name}" for name in ("null", "bool", "int", "float", "str"))},
    yaml.SequenceStartEvent: {None, "!", f"{_TAG}seq"},
    yaml.MappingStartEvent: {None, "!", f"{_TAG}map"},
}
"""Tags that a value may have: none, or one of the values that JSON has."""


class _BoundedLoader(yaml.SafeLoader):
    """PyYAML's SafeLoader within LIMITS["yaml"], for the values that JSON has.

    `nodes` counts what aliases stand for.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012  # PyYAML's own name
        first: [(tag, pattern) for tag, pattern in known if tag != _DATE]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.limits = LIMITS["yaml"]
        self.nodes = self.depth = 0
        self.anchored: dict[str, int] = {}
        """Nodes below each anchor whose node is complete, by its name."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Return the next node; _Refused for another tag, and once the limits are passed."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        before, is_alias = self.nodes, isinstance(event, yaml.AliasEvent)
        if not is_alias and event.tag not in _TAGS[type(event)]:
            way = "write the value without it, a text in quotes"
            self._refuse(f"has the tag {_shown_tag(event.tag)}: {way}", event)
        if is_alias:
            # An alias of the node around it would have no end: it is not complete, so it is not in here.
            self._count(self.anchored.get(event.anchor, self.limits.nodes + 1), event)
        else:
            self._count(1, event)
        is_container = isinstance(event, yaml.CollectionStartEvent)
        self.depth += is_container
        if self.depth > self.limits.depth:
            self._refuse(f"is nested more than {self.limits.depth} deep", event)
        node = super().compose_node(parent, index)
        self.depth -= is_container
        if isinstance(node, yaml.ScalarNode) and node.tag == _INT and len(node.value) > LONGEST_NUMBER:
            self._refuse(f"has a number of {len(node.value):,} characters", event)
        if not is_alias and event.anchor is not None:
            self.anchored[event.anchor] = self.nodes - before
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return the value of a node; _Refused where the text does not suit its tag.

        PyYAML's constructors look up, index and match a text unasked: what they raise is the file's fault.
        """
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError, MemoryError):
            raise
        except Exception:
            value = quoted(node.value) if isinstance(node.value, str) else "this"
            raise _Refused(
                f"is not YAML: {value} is no {_shown_tag(node.tag)}", node.start_mark.line + 1
            ) from None

    def _count(self, nodes: int, event: Any) -> None:
        self.nodes += nodes
        if self.nodes > self.limits.nodes:
            text = "holds aliases of aliases without end" if isinstance(event, yaml.AliasEvent) else "holds"
            self._refuse(f"{text}: more than {self.limits.nodes:,} values", event)

    def _refuse(self, reason: str, event: Any) -> None:
        raise _Refused(reason, event.start_mark.line + 1)


class _Refused(yaml.YAMLError):
    """A YAML file passes the limits at a line, or has a value there that is none."""

    def __init__(self, reason: str, line: int) -> None:
        super().__init__(reason, line)
        self.reason, self.line = reason, line


def _shown_tag(tag: str) -> str:
    """Return a tag as a file writes it: !!int; in quotes where it is none of YAML's own."""
    name = tag.removeprefix(_TAG)
    return f"!!{name}" if name != tag and name.isalnum() and len(name) < 20 else quoted(tag)


def _no_yaml(error: Exception, path: Path | str) -> BadFile:
    """Return the error for a text that is no YAML, in one line with the line number."""
    if isinstance(error, _Refused):
        return BadFile(f"{path}:{error.line}:", error.reason)
    mark = getattr(error, "problem_mark", None)
    reason = getattr(error, "problem", None) or " ".join(str(error).split())
    return BadFile(f"{path}:{mark.line + 1}:" if mark else path, f"is not YAML: {reason[:200]}")
