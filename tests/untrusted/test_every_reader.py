"""Nothing in dsv3 opens or parses a file by itself, but for the places below, each with its reason."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "dsv3"

OWN = "conf/ of dsv3 itself"
WRITES = "a file that this command writes, and no other's"
FOLDER = "a directory, which is synced or locked"
LINE = "a piece of bounded length of a file that was opened as a regular one"

ALLOWED: dict[str, str] = {
    "checkpoint/directory.py:sync": FOLDER,
    "cli/error_messages.py:_bad_yaml": "a text that was read under the limits: the error says where",
    "cli/error_messages.py:_fills": OWN,
    "cli/error_messages.py:root_groups": OWN,
    "cli/help.py": OWN,
    "cli/user_files.py:_content": "behind require_bounded_yaml",
    "config/registry.py": OWN,
    "convert/convert.py:_equal_bytes": "a reader of tensors, no file",
    "convert/destination.py:Journal.__init__": "a text of its own",
    "convert/output_file.py:DirectWriter.__init__": WRITES,
    "data/document_scan.py:join_rows": "the file that it has just written",
    "data/held_out_split.py:split_documents": WRITES,
    "distributed/streams.py:discard": "os.devnull",
    "distributed/torch_private.py:locate_saved_tensor": "an archive that require_tensor_archive has let pass",
    "distributed/watchdog.py:summarize_stacks": "the stacks of this run's own ranks",
    "documents/document_files.py:_read_json": LINE,
    "documents/input_files.py:_json_kind.has_field": LINE,
    "documents/long_json.py": LINE,
    "hf/pread_file.py:DirectReader.__init__": "a file that was opened as a regular one, without waiting",
    "launch/rendezvous.py:_parsed": "an entry of the launchers' store, whose length is bounded there",
    "metrics/terminal.py:_ResilientRichConsole.on_broken_pipe": "os.devnull",
    "metrics/wandb.py:logged_in": "the user's own netrc, as wandb reads it",
    "planning/calibrated.py:cpu_name": "the kernel's own file",
    "planning/hardware.py:_read": "the kernel's own files, of a few bytes",
    "planning/hardware.py:_read_preset": OWN,
    "tasks/probes.py:waited_seconds": "the kernel's own file",
    "tasks/train.py:_open_logger": "a logger, no file",
    "tokens/block_cache.py:BlockCache.__init__": WRITES,
    "tokens/cache.py:read_entry": FOLDER,
    "tokens/cache_listing.py:_is_open": FOLDER,
    "tokens/file_array.py:map_array": "a file that was opened as a regular one; its length bounds the array",
    "tokens/shard_index.py:sync_folder": FOLDER,
    "tokens/shard_writer.py:NpyFile.__init__": WRITES,
    "training/plan_check.py:Held.measure": "the kernel's own file",
}
"""By FILE or FILE:FUNCTION, the reason why it may."""

PARSERS = {
    *("json.load", "json.loads", "yaml.load", "yaml.safe_load", "yaml.compose", "OmegaConf.load"),
    *("np.load", "np.memmap", "np.fromfile", "np.genfromtxt", "np.loadtxt", "np.lib.format.open_memmap"),
    *("np.lib.format.read_array", "pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load"),
    *("tomllib.load", "tomllib.loads", "tarfile.open", "zipfile.ZipFile", "gzip.open", "netrc.netrc"),
}
"""Functions that read a file by its name, or that parse without limits, as they are called here."""

OPENERS = {"open", "io.open", "os.open"}

METHODS = {"open", "read_text", "read_bytes"}
"""Methods of Path."""


def _name(node: ast.expr) -> str:
    """Return the dotted name of what is called; `*.attribute` where its object is an expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = _name(node.value)
        return f"{inner}.{node.attr}"
    return "*"


def _reads(call: ast.Call) -> bool:
    """Return True for a call that reads or opens a file, other than to write it anew."""
    name = _name(call.func)
    if name in PARSERS:
        return True
    method = isinstance(call.func, ast.Attribute) and call.func.attr in METHODS and name not in OPENERS
    if method or name in ("open", "io.open"):
        given = [
            *call.args[0 if method else 1 :],
            *(each.value for each in call.keywords if each.arg == "mode"),
        ]
        mode = next((each.value for each in given if isinstance(each, ast.Constant)), "r")
        return not (isinstance(mode, str) and mode[:1] in "wxa" and "+" not in mode)
    return name == "os.open"


def calls(source: str, file: str) -> Iterator[tuple[str, int, str]]:
    """Yield FILE:FUNCTION, the line and the name of every call that opens or parses a file."""

    def visit(node: ast.AST, function: str) -> Iterator[tuple[str, int, str]]:
        for child in ast.iter_child_nodes(node):
            inside = child.name if isinstance(child, ast.FunctionDef | ast.ClassDef) else ""
            if isinstance(child, ast.Call) and _reads(child):
                yield f"{file}:{function}", child.lineno, _name(child.func)
            yield from visit(child, ".".join(filter(None, (function, inside))))

    yield from visit(ast.parse(source), "")


@cache
def found() -> list[tuple[str, int, str]]:
    """Return all such calls of the package."""
    paths = sorted(path for path in ROOT.rglob("*.py") if path.name != "untrusted_files.py")
    return [each for path in paths for each in calls(path.read_text(), str(path.relative_to(ROOT)))]


def _reason(place: str) -> str | None:
    return ALLOWED.get(place) or ALLOWED.get(place.partition(":")[0])


def test_nothing_else_opens_the_files_of_strangers() -> None:
    alone = [f"{place} (line {line}): {name}" for place, line, name in found() if _reason(place) is None]
    assert not alone, "read it through dsv3/untrusted_files.py:\n" + "\n".join(alone)


def test_every_exception_is_one() -> None:
    places = {place for place, _, _ in found()}
    used = places | {place.partition(":")[0] for place in places}
    assert not set(ALLOWED) - used


@pytest.mark.parametrize(
    "line",
    [
        "open(path)",
        "open(path, 'rb')",
        "open(path, mode='r+')",
        "path.open()",
        "path.open('rb')",
        "path.open(mode='r')",
        "(folder / 'x').read_text()",
        "path.read_bytes()",
        "os.open(path, flags)",
        "json.loads(text)",
        "yaml.safe_load(text)",
        "OmegaConf.load(path)",
        "np.load(path)",
        "np.memmap(path)",
        "pickle.Unpickler(file)",
        "torch.load(path)",
        "path.open(kind)",
    ],
)
def test_the_test_sees_it(line: str) -> None:
    assert [place for place, _, _ in calls(f"class A:\n def f(self):\n  {line}", "x.py")] == ["x.py:A.f"]


@pytest.mark.parametrize(
    "line", ["open(path, 'w')", "path.open('ab')", "path.open(mode='xb')", "logger.close()"]
)
def test_writing_is_free(line: str) -> None:
    assert not list(calls(line, "x.py"))
