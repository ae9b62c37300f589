"""A released checkpoint of a live model, written while it trains."""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import torch

from dsv3.checkpoint.directory import commit, prepare_partial
from dsv3.checkpoint.hf import stream, streamed
from dsv3.checkpoint.manifest import FileEntry, write_manifest
from dsv3.checkpoint.released.names import stored_dtype
from dsv3.checkpoint.released.shard_writer import ShardPlan, ShardWriter, index_json, plan_shards
from dsv3.checkpoint.released.shards import INDEX
from dsv3.checkpoint.released.writer import config_json
from dsv3.parallel.distributed import Distributed
from dsv3.runtime.distributed import Worker

_LARGEST_FILE = 5 * 10**9
_TOKENIZER_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}


def export_hf(model: Distributed, directory: Path, tokenizer: Path, worker: Worker) -> None:
    """Write bf16 safetensors, config.json and the tokenizer to `directory`, which appears when whole.

    All ranks call it together; rank 0 writes. UserError for a model that no released class computes.
    """
    config = model.parts[0].config
    values = config_json(config, "bfloat16")
    if not worker.is_main:
        for _ in stream(model):
            pass
        return
    partial = prepare_partial(directory)
    plans = plan_shards(
        [(name, stored_dtype(tensor, torch.bfloat16), tensor.shape) for name, tensor in streamed(config)],
        _LARGEST_FILE,
    )
    _write(model, plans, partial)
    if len(plans) > 1:
        (partial / INDEX).write_text(index_json(plans))
    (partial / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    copy_tokenizer(tokenizer, partial)
    write_manifest(partial, {path.name: FileEntry.of(path) for path in sorted(partial.iterdir())})
    commit(partial, directory)


def copy_tokenizer(stored: Path, directory: Path) -> None:
    """Put a tokenizer trained here, if there is one, where transformers looks for it."""
    file = stored / "tokenizer.json"
    if file.is_file() and not (directory / file.name).exists():
        shutil.copyfile(file, directory / file.name)
        (directory / "tokenizer_config.json").write_text(json.dumps(_TOKENIZER_CONFIG, indent=2) + "\n")


def _write(model: Distributed, plans: list[ShardPlan], directory: Path) -> None:
    """Append what is streamed to one file after another."""
    waiting = iter(plans)
    with ExitStack() as stack:
        writer, left = None, set[str]()
        for name, tensor in stream(model):
            if not left:
                stack.close()
                plan = next(waiting)
                file = stack.enter_context((directory / plan.name).open("wb"))
                writer = stack.enter_context(ShardWriter(plan, file))
                left = {entry.name for entry in plan.tensors}
            assert writer is not None
            writer.write(name, tensor)
            left.remove(name)
