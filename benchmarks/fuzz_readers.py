"""Fuzz the readers of strangers' files, guided by coverage (atheris, libFuzzer).

    python -m benchmarks.fuzz_readers npy --seconds 600     one reader; needs `pip install atheris`
    python -m benchmarks.fuzz_readers --list

A reader may only return or raise UserError. Anything else ends the search, as do 5 s for one input and 2 GB
of memory. Seconds are those of the processor, which other work cannot take. Put the input that did it into
tests/faults/cases/READER-NAME: there it stays a test.
"""

import argparse
import hashlib
import json
import os
import pickle
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np

from dsv3.errors import UserError

CASES = Path(__file__).resolve().parents[1] / "tests" / "faults" / "cases"
INSTRUMENTED = ["dsv3", "yaml", "omegaconf", "torch.distributed.checkpoint"]
SLOWEST, LONGEST_WAIT, LARGEST = 5.0, 600, 2048
"""Seconds of the processor and of the clock for one input, and MiB of the process."""


@dataclass(frozen=True)
class Reader:
    """A reader of one kind of file."""

    read: Callable[[Path], object]
    """Reads the directory into which an input was written as `name`."""
    name: str
    seeds: Callable[[], list[bytes]]
    """Returns whole files to begin with."""


def _read_metadata(folder: Path) -> None:
    from dsv3.checkpoint.dcp_metadata import read_metadata

    read_metadata(folder)


def _metadata_seeds() -> list[bytes]:
    import torch
    from torch.distributed.checkpoint import state_dict_saver
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    with tempfile.TemporaryDirectory() as folder:
        state = {"weight": torch.zeros(4, 3), "step": torch.zeros(())}
        state_dict_saver.save(state, storage_writer=FileSystemWriter(folder), no_dist=True)
        return [(Path(folder) / ".metadata").read_bytes(), pickle.dumps({"a": [1, (2, "b")]})]


def _read_safetensors(folder: Path) -> None:
    from dsv3.hf.pread_file import PreadFile
    from dsv3.hf.safetensors_header import read_header

    read_header(PreadFile(folder / "model.safetensors"))


def _safetensors_seeds() -> list[bytes]:
    import torch
    from safetensors.torch import save

    return [save({"a": torch.zeros(2, 3), "b": torch.zeros(1, dtype=torch.bfloat16)}, {"format": "pt"})]


def _read_npy(folder: Path) -> None:
    from dsv3.tokens.npy_file import NpyFile

    NpyFile.read(folder / "ids.npy", "dsv3 reads whole numbers")


def _npy_seeds() -> list[bytes]:
    found = []
    for array in (
        np.zeros(9, np.uint16),
        np.zeros((3, 4), ">i4"),
        np.asfortranarray(np.zeros((3, 4), np.int64)),
    ):
        np.save(buffer := BytesIO(), array)
        found.append(buffer.getvalue())
    return found


def _read_config(folder: Path) -> None:
    from dsv3.hf.config_json import read_hf_model

    read_hf_model(folder)


def _config_seeds() -> list[bytes]:
    values = {
        "model_type": "deepseek_v3", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 256,
        "num_attention_heads": 2, "intermediate_size": 128, "moe_intermediate_size": 32,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "kv_lora_rank": 16,
        "first_k_dense_replace": 1,
        "q_lora_rank": None, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_group": 1,
        "topk_group": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True,
        "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
        "max_position_embeddings": 4096, "num_nextn_predict_layers": 1, "tie_word_embeddings": False,
    }  # fmt: skip
    scaled = {"type": "yarn", "factor": 40, "mscale": 1.0, "original_max_position_embeddings": 4096}
    return [json.dumps(values | more).encode() for more in ({}, {"rope_scaling": scaled})]


def _read_model_yaml(folder: Path) -> None:
    from dsv3.launch.checkpoint_defaults import read_model

    read_model(folder / "model.yaml")


def _model_yaml_seeds() -> list[bytes]:
    import yaml

    from dsv3.config.strict import to_yaml
    from dsv3.hf.config_json import model_from_hf

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_bytes(_config_seeds()[0])
        model = to_yaml(model_from_hf(Path(folder)))
    return [yaml.safe_dump(model).encode(), b"a: &a [1, *a]\n"]


def _read_shards(folder: Path) -> None:
    from dsv3.tokens.shard_index import ShardIndex

    ShardIndex.read(folder)


def _shards_seeds() -> list[bytes]:
    from dsv3.tokens.shard_index import Shard, ShardIndex

    with tempfile.TemporaryDirectory() as folder:
        shard = Shard("train-00000.tokens.npy", "train-00000.offsets.npy", 9, 2)
        ShardIndex("uint16", {"train": [shard]}, 256).write(Path(folder))
        return [(Path(folder) / "index.json").read_bytes()]


def _read_megatron(folder: Path) -> None:
    from dsv3.tokens.megatron_files import open_megatron

    (folder / "corpus.bin").write_bytes(bytes(32))
    open_megatron(folder / "corpus.idx")


def _megatron_seeds() -> list[bytes]:
    lengths, offsets, documents = (
        np.array([3, 5], "<i4"),
        np.array([0, 12], "<i8"),
        np.array([0, 1, 2], "<i8"),
    )
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, len(lengths), len(documents))
    return [head + lengths.tobytes() + offsets.tobytes() + documents.tobytes()]


def _read_manifest(folder: Path) -> None:
    from dsv3.checkpoint.manifest import read_manifest

    read_manifest(folder)


def _manifest_seeds() -> list[bytes]:
    from dsv3.checkpoint.manifest import write_manifest
    from dsv3.tokens.file_digests import FileEntry

    with tempfile.TemporaryDirectory() as folder:
        write_manifest(Path(folder), {"a.distcp": FileEntry(5, "0" * 32)})
        return [(Path(folder) / "manifest.json").read_bytes()]


READERS = {
    "metadata": Reader(_read_metadata, ".metadata", _metadata_seeds),
    "safetensors": Reader(_read_safetensors, "model.safetensors", _safetensors_seeds),
    "npy": Reader(_read_npy, "ids.npy", _npy_seeds),
    "config": Reader(_read_config, "config.json", _config_seeds),
    "model_yaml": Reader(_read_model_yaml, "model.yaml", _model_yaml_seeds),
    "shards": Reader(_read_shards, "index.json", _shards_seeds),
    "megatron": Reader(_read_megatron, "corpus.idx", _megatron_seeds),
    "manifest": Reader(_read_manifest, "manifest.json", _manifest_seeds),
}


def try_input(reader: Reader, content: bytes, folder: Path) -> str | None:
    """Give `content` to a reader; return the message of its refusal, or None where it takes it."""
    (folder / reader.name).write_bytes(content)
    try:
        reader.read(folder)
    except UserError as error:
        return str(error)
    return None


class Search:
    """Gives inputs to a reader, and ends the process after `seconds`: nothing was found by then."""

    def __init__(self, reader: Reader, folder: Path, seconds: float) -> None:
        self.reader, self.folder = reader, folder
        self.inputs = self.refused = 0
        self.began = time.process_time()
        self.seconds = seconds

    def __call__(self, content: bytes) -> None:
        """Try an input; raise where its reading takes too long."""
        began = time.process_time()
        self.refused += try_input(self.reader, content, self.folder) is not None
        ended = time.process_time()
        self.inputs += 1
        if ended - began > SLOWEST:
            raise TimeoutError(f"one input took {ended - began:.1f} s")
        if ended - self.began > self.seconds:
            print(json.dumps({"inputs": self.inputs, "refused": self.refused}), flush=True)
            shutil.rmtree(self.folder.parent)
            os._exit(0)  # libFuzzer knows no other end that is no finding


def fuzz(name: str, seconds: int) -> None:
    """Search for `seconds`; never returns: the process ends, with 0 where nothing was found."""
    import atheris  # type: ignore[import-untyped,import-not-found,unused-ignore]

    with atheris.instrument_imports(include=INSTRUMENTED):
        reader = READERS[name]
        with tempfile.TemporaryDirectory() as folder:  # import what is to be instrumented
            try_input(reader, reader.seeds()[0], Path(folder))
    work = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    corpus, inputs = work / "corpus", work / "input"
    corpus.mkdir()
    inputs.mkdir()
    kept = [path.read_bytes() for path in CASES.glob(f"{name}-*")]
    for content in [*reader.seeds(), *kept]:
        (corpus / hashlib.sha256(content).hexdigest()).write_bytes(content)
    limits = (f"-timeout={LONGEST_WAIT}", f"-rss_limit_mb={LARGEST}", "-max_len=4096")
    atheris.Setup(
        [sys.argv[0], str(corpus), *limits, f"-artifact_prefix={work}/"], Search(reader, inputs, seconds)
    )
    atheris.Fuzz()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reader", nargs="?", choices=READERS)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--list", action="store_true", help="print the readers")
    options = parser.parse_args()
    if options.list or options.reader is None:
        print("\n".join(READERS))
    else:
        fuzz(options.reader, options.seconds)


if __name__ == "__main__":
    main()
