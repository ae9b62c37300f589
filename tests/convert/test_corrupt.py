"""Inputs that are damaged or of another model: each gets a message of a line or two and leaves no output."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv3.checkpoint.dcp_metadata import read_metadata
from tests.checkpoint import hostile
from tests.harness.checkpoints import seal
from tests.harness.commands import ConvertCommand
from tests.harness.outcome import refused
from tests.harness.processes import run_program

NORM = "model.norm.weight"
QUERY = "model.layers.0.self_attn.q_a_proj.weight"
SCALE = QUERY + "_scale_inv"
LAST = "model.layers.3.mlp.shared_experts.down_proj.weight_scale_inv"
COPY = "model.layers.3.embed_tokens.weight"
INDEX = "model.safetensors.index.json"
Spoil = Callable[[Path], None]


def holder(directory: Path, name: str) -> Path:
    """Return the file of a tensor."""
    weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
    return directory / str(weight_map[name])


def change(name: str, make: Callable[[Tensor], Tensor | None]) -> Spoil:
    """Replace a tensor by another one, or remove it."""

    def spoil(directory: Path) -> None:
        file = holder(directory, name)
        tensors = load_file(file)
        made = make(tensors.pop(name))
        if made is None:
            _index(directory, lambda places: places.pop(name))
        else:
            tensors[name] = made.contiguous()
        save_file(tensors, file)

    return spoil


def add(name: str, value: Tensor, beside: str = NORM) -> Spoil:
    """Add a tensor."""

    def spoil(directory: Path) -> None:
        file = holder(directory, beside)
        save_file(load_file(file) | {name: value}, file)
        _index(directory, lambda places: places.update({name: file.name}))

    return spoil


def entry(name: str, field: str, value: Any) -> Spoil:
    """Change a field of the header, whose length stays the same."""

    def spoil(directory: Path) -> None:
        file = holder(directory, name)
        raw = file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        header[name][field] = value
        text = json.dumps(header, separators=(",", ":")).encode()
        padded = text + b" " * (-len(text) % 8)
        file.write_bytes(len(padded).to_bytes(8, "little") + padded + raw[8 + length :])

    return spoil


def index(change: Callable[[dict[str, str]], object]) -> Spoil:
    return lambda directory: _index(directory, change)


def _index(directory: Path, change: Callable[[dict[str, str]], object]) -> None:
    content = json.loads((directory / INDEX).read_text())
    change(content["weight_map"])
    (directory / INDEX).write_text(json.dumps(content))


def config(**values: Any) -> Spoil:
    """Change config.json; ... removes a key."""

    def spoil(directory: Path) -> None:
        content = json.loads((directory / "config.json").read_text()) | values
        kept = {key: value for key, value in content.items() if value is not ...}
        (directory / "config.json").write_text(json.dumps(kept))

    return spoil


def write(name: str, content: bytes) -> Spoil:
    return lambda directory: void((directory / name).write_bytes(content))


def void(_: object) -> None:
    """Drop a value: a change returns nothing."""


def cut(name: str, keep: int) -> Spoil:
    """Keep only the first bytes of a tensor's file, or all but the last (negative)."""

    def spoil(directory: Path) -> None:
        file = holder(directory, name)
        file.write_bytes(file.read_bytes()[:keep])

    return spoil


def first(value: float) -> Callable[[Tensor], Tensor]:
    """Replace the first value."""

    def make(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[0] = value
        return changed

    return make


def both(one: Spoil, other: Spoil) -> Spoil:
    def spoil(directory: Path) -> None:
        one(directory)
        other(directory)

    return spoil


def as_directory(directory: Path) -> None:
    file = holder(directory, NORM)
    file.unlink()
    file.mkdir()


def dangling(directory: Path) -> None:
    file = holder(directory, NORM)
    file.unlink()
    file.symlink_to("../blobs/gone")


def longest_header(directory: Path) -> None:
    file = holder(directory, NORM)
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])


def twice(directory: Path) -> None:
    """Store a tensor in two files, without an index."""
    (directory / INDEX).unlink()
    save_file({NORM: torch.ones(64)}, directory / "model-00004-of-00003.safetensors")


FP8 = {"quant_method": "fp8", "fmt": "e4m3"}
RELEASED: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "header longer than possible": (longest_header, ("model-0000", "no safetensors file", "header of")),
    "file cut off": (cut(NORM, -5), ("model-0000", "is cut off", "ends at byte")),
    "file cut off in its header": (cut(NORM, 100), ("model-0000", "cut off in its header")),
    "empty file": (cut(NORM, 0), ("model-0000", "is empty")),
    "unknown dtype": (entry(NORM, "dtype", "BF61"), ("model-0000", NORM, "'BF61'", "Did you mean 'BF16'?")),
    "offsets far away": (entry(NORM, "data_offsets", [10**9, 10**9 + 128]), ("model-0000", "is damaged")),
    "negative offset": (entry(NORM, "data_offsets", [-128, 0]), (NORM, "data_offsets [-128, 0]")),
    "shape that is not its bytes": (entry(NORM, "shape", [65]), (NORM, "128 bytes", "needs 130")),
    "a directory for a file": (as_directory, ("model-0000", "is a directory, not a file")),
    "link to nothing": (dangling, ("model-0000", "is a link to '../blobs/gone', which is not there")),
    "tensor in two files": (twice, ("model-00004-of-00003.safetensors", NORM, "has as well")),
    "index maps to a lost file": (
        index(lambda places: places.update({NORM: "gone.safetensors"})),
        (INDEX, NORM, "'gone.safetensors', which is not there"),
    ),
    "index maps to the wrong file": (
        index(lambda places: places.update({NORM: "model-00001-of-00003.safetensors"})),
        (INDEX, NORM, "but it is in 'model-0000"),
    ),
    "index leaves one out": (index(lambda places: places.pop(NORM)), (INDEX, NORM, "leaves out")),
    "index has one too many": (
        index(lambda places: places.update({"x": "model-00001-of-00003.safetensors"})),
        (INDEX, "'x'", "which lacks it"),
    ),
    "index leads out of the directory": (
        index(lambda places: places.update({NORM: "../../etc/passwd.safetensors"})),
        (INDEX, NORM, "'../../etc/passwd.safetensors' instead of a plain file name"),
    ),
    "index with an absolute path": (
        index(lambda places: places.update({NORM: "/etc/x.safetensors"})),
        (INDEX, NORM, "'/etc/x.safetensors' instead of a plain file name"),
    ),
    "index is no JSON": (write(INDEX, b'{"weight_map": {'), (INDEX, "is damaged", "not JSON")),
    "index is not UTF-8": (write(INDEX, b"\xff\xfe{}"), (INDEX, "is not UTF-8")),
    "scale of NaN": (change(SCALE, first(float("nan"))), ("model-00001", SCALE, "scale of nan")),
    "scale of NaN in the last layer": (
        change(LAST, first(float("nan"))),
        ("model-0000", LAST, "scale of nan"),
    ),
    "scale of infinity": (change(SCALE, first(float("inf"))), (SCALE, "scale of inf")),
    "scale of zero": (change(SCALE, first(0.0)), (SCALE, "scale of 0.0: it must be above 0")),
    "negative scale": (change(SCALE, first(-1.0)), (SCALE, "scale of -1.0")),
    "missing scales": (change(SCALE, lambda _: None), ("model-00001", QUERY, "no scales", SCALE)),
    "scales of another shape": (
        change(SCALE, lambda grid: grid[:, :1]),
        ("model-00001", SCALE, "of shape [1, 1]", "needs [1, 2]"),
    ),
    "scales of integers": (change(SCALE, lambda grid: grid.int()), (SCALE, "torch.int32", "float32")),
    "scales of a weight that is not fp8": (
        add(NORM + "_scale_inv", torch.ones(1)),
        ("model-0000", NORM, "not fp8"),
    ),
    "scales of nothing": (add("x.weight_scale_inv", torch.ones(1)), ("'x.weight_scale_inv'", "no place")),
    "scales of a copy that has none": (
        add(COPY + "_scale_inv", torch.ones(3, 2)),
        ("model-0000", COPY + "_scale_inv", "no place"),
    ),
    "fp8 vector with scales": (
        both(change(NORM, lambda t: t.to(torch.float8_e4m3fn)), add(NORM + "_scale_inv", torch.ones(2))),
        ("model-0000", NORM, "blocks need a matrix"),
    ),
    "fp8 without scales where none belong": (
        change(NORM, lambda t: t.to(torch.float8_e4m3fn)),
        (NORM, "no scales"),
    ),
    "missing tensor": (change(NORM, lambda _: None), (NORM, "has no tensor", "config.json asks for")),
    "extra tensor": (add("model.layers.0.extra", torch.ones(2)), ("model.layers.0.extra", "no place")),
    "tensor with a name in Unicode": (add("模型\u202e", torch.ones(2)), ("模型\\u202e", "no place")),
    "tensor whose name is a path": (add("../../x", torch.ones(2)), ("'../../x'", "no place")),
    "tensor of a layer too many": (
        add("model.layers.9.input_layernorm.weight", torch.ones(2)),
        ("model.layers.9", "counts 3 layers"),
    ),
    "misshapen tensor": (
        change(NORM, lambda t: t[:60]),
        ("model-0000", NORM, "shape [60]", "config.json makes it [64]"),
    ),
    "transposed tensor": (
        change(QUERY, lambda t: t.view(torch.uint8).T.contiguous().view(t.dtype)),
        (QUERY,),
    ),
    "integers for weights": (change(NORM, lambda t: t.int()), ("model-0000", NORM, "torch.int32")),
    "weights of another fp8": (change(QUERY, lambda t: t.float().to(torch.float8_e5m2)), (QUERY, "e5m2")),
    "copy that differs": (
        change(COPY, first(5.0)),
        ("model-0000", COPY, "not equal to 'model.embed_tokens"),
    ),
    "copy of another type": (change(COPY, lambda t: t.float()), (COPY, "not equal")),
    "no config.json": (lambda directory: (directory / "config.json").unlink(), ("holds no config.json",)),
    "config.json is no JSON": (write("config.json", b"{"), ("config.json is not JSON",)),
    "config.json is a list": (write("config.json", b"[]"), ("config.json is no JSON object",)),
    "config.json is not UTF-8": (write("config.json", b"\xff"), ("config.json is not UTF-8",)),
    "config.json nested without end": (write("config.json", b"[" * 99999), ("config.json",)),
    "unknown model_type": (
        config(model_type="llama", architectures=...),
        ("config.json", "model_type='llama'", "deepseek_v3"),
    ),
    "missing key": (config(hidden_size=...), ("config.json has no 'hidden_size'",)),
    "text for a number": (config(hidden_size="64"), ("config.json", "hidden_size='64'", "type int")),
    "NaN for a number": (config(rope_theta=float("nan")), ("config.json", "rope_theta=nan")),
    "negative number": (config(num_hidden_layers=-3), ("config.json", "num_hidden_layers=-3")),
    "other numbers than the tensors": (config(intermediate_size=180), ("[176", "config.json makes it [180")),
    "more experts than there are": (config(n_routed_experts=16), ("mlp.gate.weight", "[8, 64]", "[16, 64]")),
    "other blocks than the scales": (
        config(quantization_config=FP8 | {"weight_block_size": [16, 16]}),
        ("_scale_inv", "in blocks of [16, 16] needs"),
    ),
    "fp8 without a quantization_config": (
        config(quantization_config=...),
        ("_scale_inv", "no quantization_config with weight_block_size, so 128 x 128 was assumed"),
    ),
    "blocks of nothing": (
        config(quantization_config=FP8 | {"weight_block_size": [0, 16]}),
        ("config.json", "weight_block_size=[0, 16]"),
    ),
    "another quantisation": (config(quantization_config={"quant_method": "awq"}), ("quant_method='awq'",)),
    "MTP layers that are not there": (
        config(num_nextn_predict_layers=2),
        ("model.layers.4.enorm", "mtp_depths"),
    ),
}


@pytest.mark.usefixtures("many_files")
@pytest.mark.parametrize("what", RELEASED)
def test_a_release_that_is_damaged_is_refused(
    convert: ConvertCommand, fp8_release: Path, tmp_path: Path, what: str
) -> None:
    spoil, said = RELEASED[what]
    source = Path(shutil.copytree(fp8_release, tmp_path / "in"))
    spoil(source)
    refused(convert("hf_to_dcp", source, tmp_path / "out"), *said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "in"]


@pytest.mark.parametrize("what", ["scale of NaN", "copy that differs", "missing scales"])
def test_from_release_to_release_too(
    convert: ConvertCommand, fp8_release: Path, tmp_path: Path, what: str
) -> None:
    spoil, said = RELEASED[what]
    source = Path(shutil.copytree(fp8_release, tmp_path / "in"))
    spoil(source)
    for dtype in ("bf16", "fp8"):
        refused(convert("hf_to_hf", source, tmp_path / "out", f"dtype={dtype}"), *said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "in"]


def metadata(change: Callable[[Any], object]) -> Spoil:
    """Change .metadata as a program that writes DCP would."""

    def spoil(directory: Path) -> None:
        content = read_metadata(directory)
        change(content)
        (directory / ".metadata").write_bytes(pickle.dumps(content))

    return spoil


def replace_entry(make: Callable[[Tensor], Any]) -> Spoil:
    """Write another object in the place of the last norm, and its length into .metadata."""

    def spoil(directory: Path) -> None:
        content = read_metadata(directory)
        (place,) = [i for i in content.storage_data if i.fqn == "model.norm.weight"]
        file = directory / "__9_0.distcp"
        torch.save(make(torch.ones(64, dtype=torch.bfloat16)), file)
        info = content.storage_data[place]
        info.relative_path, info.offset, info.length = file.name, 0, file.stat().st_size
        (directory / ".metadata").write_bytes(pickle.dumps(content))

    return spoil


class Planted:
    """Pickles as code that makes a file, which shows whether a reader ran it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("open('executed', 'w')",)


def overlapping(content: Any) -> None:
    """Make two parts overlap that together are as large as the whole."""
    norm = content.state_dict_metadata["model.norm.weight"]
    (index,) = [i for i in content.storage_data if i.fqn == "model.norm.weight"]
    part = type(norm.chunks[0])(torch.Size([0]), torch.Size([32]))
    norm.chunks[:] = [part, part]
    content.storage_data[index] = content.storage_data[index]


def outside(content: Any) -> None:
    for info in content.storage_data.values():
        info.relative_path = "../x"


def resize(content: Any) -> None:
    norm = content.state_dict_metadata["model.norm.weight"]
    norm.size = norm.chunks[0].sizes = torch.Size([60])


def retype(content: Any) -> None:
    content.state_dict_metadata["model.norm.weight"].properties.dtype = torch.int32


DATA = "__0_0.distcp"
DCP: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "missing .distcp": (lambda directory: (directory / DATA).unlink(), (DATA, "does not exist")),
    "truncated .distcp": (
        lambda directory: void((directory / DATA).write_bytes((directory / DATA).read_bytes()[:9999])),
        (DATA, "is cut off", "the entry of"),
    ),
    "empty .distcp": (write(DATA, b""), (DATA, "is cut off", "the file has 0")),
    "missing .metadata": (lambda directory: (directory / ".metadata").unlink(), ("in", "neither a run nor")),
    "truncated .metadata": (
        lambda directory: void((directory / ".metadata").write_bytes(b"\x80\x04\x95")),
        (".metadata is refused",),
    ),
    "planted pickle in .metadata": (
        lambda directory: void(
            (directory / ".metadata").write_bytes(hostile.attacks("touch executed")["os.system"][0])
        ),
        (".metadata is refused: it names os.system",),
    ),
    "planted pickle in an entry": (
        replace_entry(lambda _: Planted()),
        ("__9_0.distcp", "norm.weight", "no tensor"),
    ),
    "entry that is no tensor": (
        replace_entry(lambda _: {"a": 1}),
        ("__9_0.distcp", "norm.weight", "no tensor"),
    ),
    "entry of another shape": (replace_entry(lambda t: t[:60].clone()), ("norm.weight", "[60]", "[64]")),
    "entry of another type": (replace_entry(lambda t: t.float()), ("norm.weight", "float32", "bfloat16")),
    "tensor of another shape": (metadata(resize), ("model.norm.weight", "[60]", "[64]")),
    "tensor of integers": (metadata(retype), ("model.norm.weight", "torch.int32")),
    "missing tensor": (
        metadata(lambda content: content.state_dict_metadata.pop("model.norm.weight")),
        ("has no tensor 'model.norm.weight'",),
    ),
    "tensor that lies nowhere": (
        metadata(
            lambda content: [
                content.storage_data.pop(i)
                for i in list(content.storage_data)
                if i.fqn == "model.norm.weight"
            ]
        ),
        (".metadata does not say where 'model.norm.weight' lies",),
    ),
    "parts that overlap": (metadata(overlapping), (".metadata", "model.norm.weight", "overlap")),
    "file outside the directory": (
        metadata(outside),
        (".metadata is refused", "outside the directory"),
    ),
    "missing model.yaml": (
        lambda directory: (directory / "model.yaml").unlink(),
        ("model.yaml is missing: say which model it is, model=...",),
    ),
    "model.yaml of something else": (write("model.yaml", b"a: 1\n"), ("model.yaml is not a model",)),
    "model.yaml is no YAML": (write("model.yaml", b"a: [1\n"), ("model.yaml:2: is not YAML",)),
    "model.yaml that cannot be": (
        lambda directory: void(
            (directory / "model.yaml").write_text(
                (directory / "model.yaml").read_text().replace("num_layers: 3", "num_layers: -3")
            )
        ),
        ("num_layers=-3",),
    ),
    "notes are no JSON": (write("hf/dsv3.json", b"{"), ("hf/dsv3.json cannot be read",)),
    "notes are a list": (write("hf/dsv3.json", b"[]"), ("hf/dsv3.json", "no JSON object")),
    "notes with an impossible block": (
        write("hf/dsv3.json", b'{"block": [0, "x"]}'),
        ("hf/dsv3.json", "block="),
    ),
    "notes with another quantisation": (
        write("hf/dsv3.json", b'{"quantization_config": 3}'),
        ("hf/dsv3.json", "quantization_config=3"),
    ),
    "scales cut off": (
        lambda directory: void(
            (directory / "hf/scales.safetensors").write_bytes(
                (directory / "hf/scales.safetensors").read_bytes()[:-4]
            )
        ),
        ("hf/scales.safetensors", "is cut off"),
    ),
    "scales of another shape": (
        lambda directory: save_file({QUERY: torch.ones(9, 9)}, directory / "hf/scales.safetensors"),
        ("hf/scales.safetensors", QUERY, "[9, 9]", "[1, 2]"),
    ),
    "config.json is no JSON": (write("hf/config.json", b"{"), ("hf/config.json is not JSON",)),
}


@pytest.fixture(scope="session")
def _dcp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("converted") / "dcp"


@pytest.fixture
def dcp(_dcp: Path, convert: ConvertCommand, fp8_release: Path, tmp_path: Path) -> Path:
    """Return a DCP that a test may damage."""
    if not _dcp.exists():
        convert.must("hf_to_dcp", fp8_release, _dcp)
    return Path(shutil.copytree(_dcp, tmp_path / "in"))


@pytest.mark.parametrize("what", DCP)
def test_a_dcp_that_is_damaged_is_refused(
    convert: ConvertCommand, dcp: Path, tmp_path: Path, what: str
) -> None:
    """Without a manifest, as other programs write DCPs, or with one that was made to fit."""
    spoil, said = DCP[what]
    (dcp / "manifest.json").unlink()
    spoil(dcp)
    for _ in ("without", "with"):
        refused(convert("dcp_to_hf", dcp, tmp_path / "out", "dtype=fp8"), *said)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "in"]
        assert not any((tmp_path / "here").iterdir())
        seal(dcp)


@pytest.mark.parametrize("name", ["__0_0.distcp", "hf/scales.safetensors", "hf/config.json", ".metadata"])
def test_a_manifest_tells_of_files_that_are_not_whole(
    convert: ConvertCommand, dcp: Path, tmp_path: Path, name: str
) -> None:
    (dcp / name).write_bytes((dcp / name).read_bytes()[:-1])
    refused(convert("dcp_to_hf", dcp, tmp_path / "out"), str(dcp / name), "truncated")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["scale of NaN", "missing tensor"])
def test_the_real_command_says_the_same(fp8_release: Path, tmp_path: Path, what: str) -> None:
    spoil, said = RELEASED[what]
    source = Path(shutil.copytree(fp8_release, tmp_path / "in"))
    spoil(source)
    asked = ["direction=hf_to_dcp", f"input={source}", f"output={tmp_path / 'out'}"]
    refused(run_program("convert.py", *asked), *said)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
